package access

import (
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/trust"
)

// who may call a procedure.
type who int

const (
	operators who = iota
	users         // operators, and experimenters about what is theirs
	strangers     // whoever can reach the server
)

func (w who) String() string { return [...]string{"operator", "experimenter", "anyone"}[w] }

// row is a rule about a procedure.
type row struct {
	who who
	// names are the slices that a request is about, which an experimenter must own. Nil if
	// a request names none, or if the handler has to know more.
	names func(proto.Message) []string
	// operator says what of a request takes an operator; empty if nothing does.
	operator func(proto.Message) string
}

// table has a row for each procedure of the services that are served to users.
var table = map[string]row{
	violinv1connect.SliceServiceUpProcedure:            {who: users, operator: overcommit}, // whose name it takes, its handler looks at
	violinv1connect.SliceServiceDownProcedure:          {who: users, names: sliceOrAll},
	violinv1connect.SliceServiceListSlicesProcedure:    {who: users, names: sliceOrAll},
	violinv1connect.SliceServiceSnapshotProcedure:      {who: users, names: slice},
	violinv1connect.SliceServiceListSnapshotsProcedure: {who: users, names: sliceOrAll},
	violinv1connect.SliceServiceRestoreProcedure:       {who: users, names: snapshot, operator: overcommit},
	violinv1connect.SliceServiceExecProcedure:          {who: users, names: slice},
	violinv1connect.SliceServiceConsoleProcedure:       {who: users, names: slice},
	violinv1connect.SliceServiceConsoleLogProcedure:    {who: users, names: slice},
	violinv1connect.SliceServiceVersionProcedure:       {who: users},
	violinv1connect.SliceServiceVerifyProcedure:        {who: users, names: snapshot},
	violinv1connect.SliceServiceFramesProcedure:        {who: users, names: snapshot},

	violinv1connect.HistoryServiceLogProcedure: {who: users, names: slice},
	violinv1connect.HistoryServiceTagProcedure: {who: users, names: snapshot},

	violinv1connect.LifecycleServiceSuspendProcedure:  {who: users, names: sliceOrAll, operator: drain},
	violinv1connect.LifecycleServiceResumeProcedure:   {who: users, names: slice, operator: overcommit},
	violinv1connect.LifecycleServiceForkProcedure:     {who: users, names: snapshot, operator: overcommit}, // and its handler looks at the name it takes
	violinv1connect.LifecycleServiceContinueProcedure: {who: users, names: slice},

	violinv1connect.ProtectionServiceProtectProcedure:         {who: users, names: slice},
	violinv1connect.ProtectionServiceUnprotectProcedure:       {who: users, names: slice},
	violinv1connect.ProtectionServiceListProtectionsProcedure: {who: users, names: sliceOrAll},
	violinv1connect.ProtectionServiceEventsProcedure:          {who: users, names: sliceOrAll},

	violinv1connect.StoreServiceStatsProcedure:   {who: users},
	violinv1connect.StoreServiceCheckProcedure:   {who: operators},
	violinv1connect.StoreServiceCollectProcedure: {who: operators},
	violinv1connect.StoreServiceForgetProcedure:  {who: users, names: forgotten},
	violinv1connect.StoreServiceExportProcedure:  {who: users, names: snapshot},
	// A snapshot from elsewhere is a program for QEMU, and its topology names files of the server's.
	violinv1connect.StoreServiceImportProcedure: {who: operators},

	violinv1connect.ImageServiceListImagesProcedure:  {who: users},
	violinv1connect.ImageServiceRemoveImageProcedure: {who: operators},

	violinv1connect.HostServiceCreateTokenProcedure: {who: operators},
	violinv1connect.HostServiceListHostsProcedure:   {who: operators},
	violinv1connect.HostServiceRemoveHostProcedure:  {who: operators},
	violinv1connect.HostServiceCordonHostProcedure:  {who: operators},

	violinv1connect.UserServiceLoginProcedure:      {who: strangers},
	violinv1connect.UserServiceRenewProcedure:      {who: users},
	violinv1connect.UserServiceLogoutProcedure:     {who: users},
	violinv1connect.UserServiceWhoAmIProcedure:     {who: users},
	violinv1connect.UserServiceListUsersProcedure:  {who: operators},
	violinv1connect.UserServiceRemoveUserProcedure: {who: operators},
	violinv1connect.UserServiceGiveSliceProcedure:  {who: operators},
}

func slice(m proto.Message) []string {
	return []string{m.(interface{ GetSlice() string }).GetSlice()}
}

// sliceOrAll is for procedures that are about all slices, of the caller's, if a request
// names none: their handlers see to that.
func sliceOrAll(m proto.Message) []string {
	return slices.DeleteFunc(slice(m), func(name string) bool { return name == "" })
}

func snapshot(m proto.Message) []string {
	return []string{sliceOf(m.(interface{ GetSnapshot() string }).GetSnapshot())}
}

// sliceOf is the slice of SLICE@ID. What has no @ may name a snapshot of any slice: it
// names no slice, which is nobody's.
func sliceOf(ref string) string {
	name, _, ok := strings.Cut(ref, "@")
	if !ok {
		return ""
	}
	return name
}

func forgotten(m proto.Message) []string {
	var names []string
	req := m.(*violinv1.ForgetRequest)
	for _, ref := range req.GetSnapshots() {
		names = append(names, sliceOf(ref))
	}
	if req.GetSlice() != "" || len(names) == 0 {
		names = append(names, req.GetSlice())
	}
	return names
}

func overcommit(m proto.Message) string {
	if m.(interface{ GetOvercommit() bool }).GetOvercommit() {
		return "to start what does not fit"
	}
	return ""
}

func drain(m proto.Message) string {
	if m.(*violinv1.SuspendRequest).GetHost() != "" {
		return "to drain a host"
	}
	return ""
}

// allows tells whether a role may call a procedure at all.
func (w who) allows(role trust.Role) bool {
	switch role {
	case trust.Operator:
		return true
	case trust.Experimenter:
		return w != operators
	}
	return w == strangers
}
