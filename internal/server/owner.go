package server

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"connectrpc.com/connect"

	violinv1 "violin/api/violin/v1"
	"violin/internal/access"
	"violin/internal/catalog"
	"violin/internal/topology"
)

var _ access.Owners = (*Server)(nil)

// Owner implements [access.Owners]. The owner of a slice's name is whoever took it
// first, for as long as anything has it: what runs, is suspended, or is a snapshot.
func (s *Server) Owner(slice string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ownerLocked(slice)
}

func (s *Server) ownerLocked(slice string) string {
	if r := s.records[slice]; r != nil {
		return r.Owner
	}
	return ""
}

// owns tells whether a slice is its caller's to see, in a list of all.
func (s *Server) owns(ctx context.Context, slice string) bool {
	return access.From(ctx).Owns(s.Owner(slice))
}

func (s *Server) ownsLocked(ctx context.Context, slice string) bool {
	return access.From(ctx).Owns(s.ownerLocked(slice))
}

// owned are the snapshots that are the caller's to see.
func (s *Server) owned(ctx context.Context, all []*catalog.Snapshot) []*catalog.Snapshot {
	return slices.DeleteFunc(all, func(snap *catalog.Snapshot) bool { return !s.owns(ctx, snap.Slice) })
}

// ownedNames are the names of slices and snapshots that are the caller's to see.
func (s *Server) ownedNames(ctx context.Context, names []string) []string {
	return slices.DeleteFunc(names, func(name string) bool {
		slice, _, _ := strings.Cut(name, "@")
		return !s.owns(ctx, slice)
	})
}

// message is a slice as the API tells it, with its owner.
func (s *Server) message(ctx context.Context, sl *slice) *violinv1.Slice {
	m := sl.message(ctx)
	m.Owner = s.Owner(m.GetName())
	return m
}

// mayTake refuses a name that is another's, and tells nothing of what it is of.
func (s *Server) mayTake(ctx context.Context, name string) error {
	if access.From(ctx).Operator() || s.owns(ctx, name) {
		return nil
	}
	used, err := s.inUse(ctx, name)
	if err != nil {
		return err
	}
	if used {
		return nameTaken(name)
	}
	return nil
}

// nameTaken tells nothing of who has it.
func nameTaken(name string) error {
	return connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("slice %q: the name is taken; choose another", name))
}

// inUse tells whether anything has a slice's name.
func (s *Server) inUse(ctx context.Context, name string) (bool, error) {
	s.mu.Lock()
	_, runs := s.slices[name]
	r := s.records[name]
	s.mu.Unlock()
	if runs || r != nil && (r.Suspended != nil || r.Protection != nil) {
		return true, nil
	}
	found, err := s.catalog.Has(ctx, name)
	if err != nil {
		return false, apiError(err)
	}
	return found, nil
}

// takeName makes a caller the owner of the name that a slice comes up by, unless it has
// one. The name has been claimed: nobody else comes up by it meanwhile.
func (s *Server) takeName(ctx context.Context, name string) error {
	s.naming.Lock()
	defer s.naming.Unlock()
	caller := access.From(ctx)
	found, err := s.catalog.Has(ctx, name)
	if err != nil {
		return apiError(err)
	}
	switch {
	case found && !caller.Owns(s.Owner(name)):
		return nameTaken(name)
	case found || s.Owner(name) == caller.Name:
		return nil
	}
	if err := s.record(ctx, name, func(r *catalog.Record) { r.Owner = caller.Name }); err != nil {
		return apiError(err)
	}
	return nil
}

// freeName makes a name nobody's that nothing has any more.
func (s *Server) freeName(ctx context.Context, name string) {
	s.naming.Lock()
	defer s.naming.Unlock()
	if s.Owner(name) == "" {
		return
	}
	used, err := s.inUse(ctx, name)
	if err == nil && !used {
		err = s.record(ctx, name, func(r *catalog.Record) { r.Owner = "" })
	}
	if err != nil {
		s.log.Error("the name of a slice that is gone stays its owner's", "slice", name, "err", err)
	}
}

// GiveSlice implements the API.
func (s *Server) GiveSlice(ctx context.Context, req *violinv1.GiveSliceRequest) (*violinv1.GiveSliceResponse, error) {
	name := req.GetSlice()
	if err := catalog.CheckName(name); err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	if req.GetUser() != "" {
		if _, err := s.user(req.GetUser()); err != nil {
			return nil, err
		}
	}
	s.naming.Lock()
	defer s.naming.Unlock()
	used, err := s.inUse(ctx, name)
	if err != nil {
		return nil, err
	}
	if !used {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("slice %q neither runs nor has snapshots", name))
	}
	if err := s.record(ctx, name, func(r *catalog.Record) { r.Owner = req.GetUser() }); err != nil {
		return nil, apiError(err)
	}
	return &violinv1.GiveSliceResponse{}, nil
}

// harmlessFields are the parts of a topology that experimenters may use. All others
// take an operator: what names a file of the server's, which runs as root, or goes to
// QEMU as it is.
var harmlessFields = map[reflect.Type][]string{
	reflect.TypeFor[topology.Topology]():  {"Slice", "Sites", "WAN", "Networks", "Nodes"},
	reflect.TypeFor[topology.Site]():      {"Name", "Hosts"},
	reflect.TypeFor[topology.Link]():      {"Between", "Delay", "Jitter", "Loss", "Reorder", "Rate"},
	reflect.TypeFor[topology.Network]():   {"Name", "Subnet", "MTU", "Gateway", "Hold", "Closed"},
	reflect.TypeFor[topology.Node]():      {"Name", "Host", "Site", "Image", "Append", "Firmware", "Boot", "Memory", "CPUs", "Disks", "CloudInit", "Interfaces", "Forwards", "Run"},
	reflect.TypeFor[topology.CloudInit](): {"Off", "UserData", "Keys"},
	reflect.TypeFor[topology.Disk]():      {"Name", "Size"},
	reflect.TypeFor[topology.Interface](): {"Network", "Address", "MAC", "Model"},
	reflect.TypeFor[topology.Forward]():   {"Protocol", "Listen", "Yield", "Port"}, // but see mayForward
}

// harmless refuses a topology that takes an operator.
func harmless(topo *topology.Topology) error {
	var bad []string
	inspect(reflect.ValueOf(*topo), "", &bad)
	if len(bad) == 0 {
		return nil
	}
	slices.Sort(bad)
	return errors.New("in the topology, " + strings.Join(slices.Compact(bad), ", ") + " takes an operator: an experimenter's nodes boot from images, and have disks that begin empty")
}

func inspect(v reflect.Value, path string, bad *[]string) {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			inspect(v.Elem(), path, bad)
		}
	case reflect.Slice, reflect.Array:
		for i := range v.Len() {
			inspect(v.Index(i), path, bad)
		}
	case reflect.Struct:
		fields, ours := harmlessFields[v.Type()]
		if !ours {
			return // a plain value, such as an address, of a field that is looked at
		}
		for i := range v.NumField() {
			name := v.Type().Field(i).Name
			at := strings.TrimPrefix(path+"."+name, ".")
			if slices.Contains(fields, name) {
				inspect(v.Field(i), at, bad)
			} else if !v.Field(i).IsZero() {
				*bad = append(*bad, at)
			}
		}
	}
}
