package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/dynamicpb"
	"google.golang.org/protobuf/types/known/durationpb"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/access"
	"violin/internal/catalog"
	"violin/internal/events"
	"violin/internal/topology"
	"violin/internal/trust"
)

// operator is the context of a call by the unix socket.
func operator(t *testing.T) context.Context {
	return access.With(t.Context(), access.Caller{Role: trust.Operator})
}

// listening is a server that takes users in, with suspended slices of alice's (hers),
// of bob's (his) and of nobody's (pair), each with a snapshot.
func listening(t *testing.T) *Server {
	t.Helper()
	s, err := New(t.Context(), Config{StateDir: t.TempDir(), RunDir: t.TempDir(), Logger: slog.New(slog.DiscardHandler), Listen: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	snap := keep(t, s, "1", "", time.Now(), 1)
	for name, owner := range map[string]string{"hers": "alice", "his": "bob", "pair": ""} {
		if name != snap.Slice {
			other := *snap
			other.Slice = name
			if err := s.catalog.Put(t.Context(), &other); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.record(t.Context(), name, func(r *catalog.Record) {
			r.Owner, r.Suspended = owner, &catalog.Suspension{Snapshot: "1", At: time.Now()}
		}); err != nil {
			t.Fatal(err)
		}
		s.tell(events.Event{Slice: name, Kind: events.Suspended})
	}
	return s
}

// client is a user's way to a server.
type client struct {
	*http.Client
	base string
}

func dialTLS(t *testing.T, s *Server, config *tls.Config) client {
	t.Helper()
	var protocols http.Protocols
	protocols.SetHTTP2(true)
	config.NextProtos = []string{"h2"}
	c := &http.Client{Transport: &http.Transport{Protocols: &protocols, TLSClientConfig: config}}
	t.Cleanup(c.CloseIdleConnections)
	return client{c, "https://" + s.hub.Address()}
}

// loginAs logs a user in, over the wire.
func loginAs(t *testing.T, s *Server, name string, role violinv1.Role) *trust.Login {
	t.Helper()
	r, err := s.CreateToken(operator(t), &violinv1.CreateTokenRequest{Ttl: durationpb.New(time.Minute), User: name, Role: role})
	if err != nil {
		t.Fatal(err)
	}
	token, err := trust.ParseToken(r.GetToken())
	if err != nil {
		t.Fatal(err)
	}
	c := dialTLS(t, s, trust.LoginConfig(token))
	login, err := trust.OpenLogins(t.TempDir()).Login(t.Context(), s.hub.Address(), token, func(ctx context.Context, request []byte) ([]byte, []byte, error) {
		r, err := violinv1connect.NewUserServiceClient(c, c.base).Login(ctx, &violinv1.LoginRequest{Token: token.String(), Request: request})
		return r.GetCertificate(), r.GetAuthority(), err
	})
	if err != nil {
		t.Fatal(err)
	}
	return login
}

func as(t *testing.T, s *Server, name string, role violinv1.Role) client {
	t.Helper()
	return dialTLS(t, s, loginAs(t, s, name, role).Config())
}

// answer is what a call ended with.
type answer struct{ Code, Message, Body string }

// call makes a call as a script does, in JSON over HTTP, and says how it ended.
func (c client) call(t *testing.T, m protoreflect.MethodDescriptor, body []byte) answer {
	t.Helper()
	streams, kind := m.IsStreamingClient() || m.IsStreamingServer(), "application/json"
	if streams {
		kind = "application/connect+json"
		body = append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(body))), body...)
	}
	resp, err := c.Post(c.base+"/"+string(m.Parent().FullName())+"/"+string(m.Name()), kind, bytes.NewReader(body))
	if err != nil {
		t.Fatalf("%s: %v", m.FullName(), err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s: %v", m.FullName(), err)
	}
	a := answer{Body: string(b)}
	if !streams {
		if resp.StatusCode != http.StatusOK {
			if err := json.Unmarshal(b, &a); err != nil {
				t.Fatalf("%s: %s: %q", m.FullName(), resp.Status, b)
			}
		}
		return a
	}
	for len(b) >= 5 {
		n := 5 + int(binary.BigEndian.Uint32(b[1:]))
		if b[0]&2 != 0 {
			var end struct{ Error answer }
			if err := json.Unmarshal(b[5:n], &end); err != nil {
				t.Fatalf("%s: %v", m.FullName(), err)
			}
			a.Code, a.Message = end.Error.Code, end.Error.Message
		}
		b = b[n:]
	}
	return a
}

// ofMachines are the services that are served to agents, by another protocol.
var ofMachines = []protoreflect.Name{"JoinService", "AgentService", "IngestService", "RenewalService", "ProvisionService", "SupplyService"}

// procedures are those that there are.
func procedures(t *testing.T) []protoreflect.MethodDescriptor {
	t.Helper()
	var all []protoreflect.MethodDescriptor
	protoregistry.GlobalFiles.RangeFilesByPackage("violin.v1", func(f protoreflect.FileDescriptor) bool {
		for i := range f.Services().Len() {
			service := f.Services().Get(i)
			if slices.Contains(ofMachines, service.Name()) {
				continue
			}
			for k := range service.Methods().Len() {
				all = append(all, service.Methods().Get(k))
			}
		}
		return true
	})
	if len(all) < 30 {
		t.Fatalf("%d procedures", len(all))
	}
	return all
}

// about is a request of a procedure's about a slice, or about none.
func about(t *testing.T, m protoreflect.MethodDescriptor, slice string) []byte {
	t.Helper()
	req := dynamicpb.NewMessage(m.Input())
	set := func(name protoreflect.Name, value protoreflect.Value) {
		if f := m.Input().Fields().ByName(name); f != nil && slice != "" {
			if f.IsList() {
				req.Mutable(f).List().Append(value)
			} else {
				req.Set(f, value)
			}
		}
	}
	set("slice", protoreflect.ValueOfString(slice))
	set("snapshot", protoreflect.ValueOfString(slice+"@1"))
	set("snapshots", protoreflect.ValueOfString(slice+"@1"))
	set("as", protoreflect.ValueOfString("fork"))
	set("every", protoreflect.ValueOfMessage(durationpb.New(time.Hour).ProtoReflect()))
	set("topology", protoreflect.ValueOfBytes([]byte(strings.ReplaceAll(imaged, "NAME", slice))))
	if m.Name() == "Forget" {
		req.Clear(m.Input().Fields().ByName("slice"))
	}
	b, err := protojson.Marshal(req)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// imaged is a topology that could be an experimenter's, of an image that is not there.
const imaged = `version: 1
slice: NAME
sites: {here: {hosts: [h1]}}
networks: {lan: {}}
nodes: {n1: {host: h1, image: none, memory: 64MiB, interfaces: [{network: lan}]}}
`

// Of every procedure: a stranger may call none but Login; and to an experimenter,
// somebody else's slice is as one that does not exist.
func TestNobodyElses(t *testing.T) {
	s := listening(t)
	alice := as(t, s, "alice", violinv1.Role_ROLE_EXPERIMENTER)
	token, err := s.authority.NewUserToken(trust.User{Name: "eve", Role: trust.Operator}, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	stranger := dialTLS(t, s, trust.LoginConfig(token))
	for _, m := range procedures(t) {
		t.Run(string(m.Parent().Name()+"/"+m.Name()), func(t *testing.T) {
			a := stranger.call(t, m, about(t, m, "his"))
			if want := "unauthenticated"; m.Name() != "Login" && a.Code != want || m.Name() == "Login" && a.Code != "permission_denied" {
				t.Errorf("a stranger gets %v, want %s", a, want)
			}
			switch m.Name() {
			case "Logout", "Login", "Renew": // of the caller's own
				return
			}
			his, none := alice.call(t, m, about(t, m, "his")), alice.call(t, m, about(t, m, "ghost"))
			if m.Name() == "Up" {
				if his.Code != "already_exists" || strings.Contains(his.Message, "suspended") || none.Code != "failed_precondition" {
					t.Errorf("alice gets %v for a name of bob's, and %v for a free one", his, none)
				}
			} else {
				none.Message = strings.ReplaceAll(none.Message, "ghost", "his")
				if his.Code != none.Code || his.Message != none.Message {
					t.Errorf("alice gets %v for bob's, and %v for nothing's", his, none)
				}
				if bytes.Contains(about(t, m, "his"), []byte("his")) && his.Code != "not_found" && his.Code != "permission_denied" {
					t.Errorf("alice gets %v for bob's", his)
				}
			}
			switch m.Name() {
			case "Down", "Suspend", "Export", "Import": // would do it, or needs a snapshot
				return
			}
			if all := alice.call(t, m, about(t, m, "")); strings.Contains(all.Body, "his") || strings.Contains(all.Body, "bob") || strings.Contains(all.Body, `"pair"`) {
				t.Errorf("alice is told of bob's: %v", all)
			}
		})
	}
	for _, name := range []string{"hers", "his", "pair"} {
		if s.suspension(name) == nil {
			t.Errorf("slice %s is not what it was", name)
		}
	}
}

// What is their own, experimenters see and change; operators all of it.
func TestOnesOwn(t *testing.T) {
	s := listening(t)
	alice, bob, op := as(t, s, "alice", violinv1.Role_ROLE_EXPERIMENTER), as(t, s, "bob", violinv1.Role_ROLE_EXPERIMENTER), as(t, s, "op", violinv1.Role_ROLE_OPERATOR)
	for _, test := range []struct {
		who  client
		want string
	}{{alice, "hers"}, {bob, "his"}, {op, "hers his pair"}} {
		list, err := violinv1connect.NewSliceServiceClient(test.who, test.who.base).ListSlices(t.Context(), &violinv1.ListSlicesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		// As gRPC, too.
		snapshots, err := violinv1connect.NewSliceServiceClient(test.who, test.who.base, connect.WithGRPC()).ListSnapshots(t.Context(), &violinv1.ListSnapshotsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		stream, err := violinv1connect.NewProtectionServiceClient(test.who, test.who.base).Events(t.Context(), &violinv1.EventsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		var running, kept, told []string
		for _, sl := range list.GetSlices() {
			running = append(running, sl.GetName())
		}
		for _, snap := range snapshots.GetSnapshots() {
			kept = append(kept, snap.GetSlice())
		}
		for stream.Receive() {
			told = append(told, stream.Msg().GetSlice())
		}
		for _, got := range [][]string{running, kept, told} {
			slices.Sort(got)
			if strings.Join(got, " ") != test.want {
				t.Errorf("%v, want %s", got, test.want)
			}
		}
		stats, err := violinv1connect.NewStoreServiceClient(test.who, test.who.base).Stats(t.Context(), &violinv1.StatsRequest{})
		if err != nil || int(stats.GetSnapshots()) != len(strings.Fields(test.want)) || (stats.GetLocation() == "") != (len(kept) == 1) {
			t.Error(stats, err)
		}
	}
	// An experimenter takes all of hers down, and the name stays hers while there is a snapshot.
	slicesOf := func(c client) violinv1connect.SliceServiceClient {
		return violinv1connect.NewSliceServiceClient(c, c.base)
	}
	if _, err := slicesOf(alice).Down(t.Context(), &violinv1.DownRequest{Slice: "hers"}); err != nil {
		t.Error(err)
	}
	up := func(c client, name string) error {
		stream, err := slicesOf(c).Up(t.Context(), &violinv1.UpRequest{Topology: []byte(strings.ReplaceAll(imaged, "NAME", name))})
		if err != nil {
			return err
		}
		defer stream.Close()
		for stream.Receive() {
		}
		return stream.Err()
	}
	if err := up(bob, "hers"); connect.CodeOf(err) != connect.CodeAlreadyExists {
		t.Error(err)
	}
	if err := up(alice, "pair"); connect.CodeOf(err) != connect.CodeAlreadyExists {
		t.Errorf("a name of the operators' is taken: %v", err)
	}
	forget := func(c client, ref string) error {
		_, err := violinv1connect.NewStoreServiceClient(c, c.base).Forget(t.Context(), &violinv1.ForgetRequest{Snapshots: []string{ref}})
		return err
	}
	if err := forget(alice, "hers@1"); err != nil {
		t.Error(err)
	}
	if owner := s.Owner("hers"); owner != "" {
		t.Errorf("a name that nothing has is %s's", owner)
	}
	// A snapshot named without its slice could be anybody's.
	if err := forget(alice, "1"); connect.CodeOf(err) != connect.CodeNotFound {
		t.Error(err)
	}
	if err := up(bob, "hers"); connect.CodeOf(err) != connect.CodeFailedPrecondition { // there is no such image
		t.Error(err)
	}
	if owner := s.Owner("hers"); owner != "" {
		t.Errorf("the name of what did not come up is %s's", owner)
	}
	// What was his is given to alice, and not to somebody who is not there.
	give := func(c client, to string) error {
		_, err := violinv1connect.NewUserServiceClient(c, c.base).GiveSlice(t.Context(), &violinv1.GiveSliceRequest{Slice: "his", User: to})
		return err
	}
	if err := give(alice, "alice"); connect.CodeOf(err) != connect.CodePermissionDenied {
		t.Error(err)
	}
	if err := give(op, "carol"); connect.CodeOf(err) != connect.CodeNotFound {
		t.Error(err)
	}
	if err := give(op, "alice"); err != nil {
		t.Error(err)
	}
	if _, err := slicesOf(alice).ListSlices(t.Context(), &violinv1.ListSlicesRequest{Slice: "his"}); err != nil {
		t.Error(err)
	}
	if _, err := slicesOf(bob).ListSlices(t.Context(), &violinv1.ListSlicesRequest{Slice: "his"}); connect.CodeOf(err) != connect.CodeNotFound {
		t.Error(err)
	}
}

// Who is put out is out at once, on connections that are open, too.
func TestRemoveUser(t *testing.T) {
	s := listening(t)
	login := loginAs(t, s, "alice", violinv1.Role_ROLE_EXPERIMENTER)
	alice, op := dialTLS(t, s, login.Config()), as(t, s, "op", violinv1.Role_ROLE_OPERATOR)
	stream, err := violinv1connect.NewProtectionServiceClient(alice, alice.base).Events(t.Context(), &violinv1.EventsRequest{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	if !stream.Receive() {
		t.Fatal(stream.Err())
	}
	list, err := violinv1connect.NewUserServiceClient(op, op.base).ListUsers(t.Context(), &violinv1.ListUsersRequest{})
	if err != nil || len(list.GetUsers()) != 2 || list.GetUsers()[0].GetUser().GetName() != "alice" || list.GetUsers()[0].GetConnections() != 1 ||
		strings.Join(list.GetUsers()[0].GetSlices(), " ") != "hers" {
		t.Error(list, err)
	}
	if _, err := violinv1connect.NewUserServiceClient(op, op.base).RemoveUser(t.Context(), &violinv1.RemoveUserRequest{Name: "alice"}); err != nil {
		t.Fatal(err)
	}
	if stream.Receive() || stream.Err() == nil {
		t.Error("what she listened to goes on")
	}
	for range 2 { // on what is left of the connection, and on another
		_, err := violinv1connect.NewUserServiceClient(alice, alice.base).WhoAmI(t.Context(), &violinv1.WhoAmIRequest{})
		if err == nil || !strings.Contains(err.Error(), "revoked") && connect.IsWireError(err.(*connect.Error)) {
			t.Errorf("she is still known: %v", err)
		}
		alice = dialTLS(t, s, login.Config())
	}
	if s.Owner("hers") != "alice" {
		t.Error("her slice is another's")
	}
}

// A certificate of another authority's does not get as far as a call.
func TestForeigners(t *testing.T) {
	s, other := listening(t), listening(t)
	config := loginAs(t, other, "op", violinv1.Role_ROLE_OPERATOR).Config()
	config.RootCAs = loginAs(t, s, "op", violinv1.Role_ROLE_OPERATOR).Config().RootCAs
	c := dialTLS(t, s, config)
	if _, err := violinv1connect.NewUserServiceClient(c, c.base).WhoAmI(t.Context(), &violinv1.WhoAmIRequest{}); err == nil || connect.IsWireError(err.(*connect.Error)) {
		t.Errorf("an operator of another server is heard: %v", err)
	}
	config.RootCAs = nil
	c = dialTLS(t, s, config)
	if _, err := violinv1connect.NewUserServiceClient(c, c.base).WhoAmI(t.Context(), &violinv1.WhoAmIRequest{}); err == nil {
		t.Error("a server is believed that nobody vouches for")
	}
}

// Whatever of a topology is not known to be harmless takes an operator.
func TestHarmless(t *testing.T) {
	parse := func(node string) *topology.Topology {
		topo, err := topology.Parse("test", []byte(strings.Replace(strings.ReplaceAll(imaged, "NAME", "x"), "image: none", node, 1)))
		if err != nil {
			t.Fatal(err)
		}
		return topo
	}
	for node, part := range map[string]string{
		"image: none": "", "image: none, cpus: 2, run: echo, append: quiet": "",
		"image: none, disks: [{name: data, size: 1GiB}]":                   "",
		"image: none, disks: [{name: data, base: /etc/shadow}]":            "Nodes.Disks.Base",
		"image: none, shares: [{name: data, directory: /etc}]":             "Nodes.Shares",
		"image: none, cloud_init: {user_data: \"#!/bin/sh\"}":              "",
		"image: none, cloud_init: {user_data_file: /etc/shadow}":           "Nodes.CloudInit.UserDataFile",
		"kernel: /boot/vmlinuz":                                            "Nodes.Kernel",
		"kernel: /boot/vmlinuz, initrd: /boot/initrd, rootfs: /etc/shadow": "Nodes.RootFS",
	} {
		err := harmless(parse(node))
		if (err == nil) != (part == "") || err != nil && !strings.Contains(err.Error(), part) {
			t.Errorf("%s: %v", node, err)
		}
	}
}
