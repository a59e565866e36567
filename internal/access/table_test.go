package access

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	_ "violin/api/violin/v1"
	"violin/internal/trust"
)

// ofMachines are the services that are served to agents, by another protocol.
var ofMachines = []protoreflect.Name{"JoinService", "AgentService", "IngestService", "RenewalService", "ProvisionService", "SupplyService"}

// each calls f for every procedure that there is for users.
func each(f func(path string, m protoreflect.MethodDescriptor)) {
	protoregistry.GlobalFiles.RangeFilesByPackage("violin.v1", func(file protoreflect.FileDescriptor) bool {
		for i := range file.Services().Len() {
			s := file.Services().Get(i)
			for k := range s.Methods().Len() {
				if !slices.Contains(ofMachines, s.Name()) {
					f(fmt.Sprintf("/%s/%s", s.FullName(), s.Methods().Get(k).Name()), s.Methods().Get(k))
				}
			}
		}
		return true
	})
}

// Every procedure has a row, and a request that names a slice or a snapshot is looked
// at; docs/api.md tells the same.
func TestTable(t *testing.T) {
	doc, err := os.ReadFile("../../docs/api.md")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	each(func(path string, m protoreflect.MethodDescriptor) {
		seen[path] = true
		r, ok := table[path]
		if !ok {
			t.Errorf("%s has no row: who may call it?", path)
			return
		}
		line := fmt.Sprintf("| `%s/%s` | %s |", m.Parent().Name(), m.Name(), r.who)
		if !strings.Contains(string(doc), line) {
			t.Errorf("docs/api.md has no row %s", line)
		}
		fields := m.Input().Fields()
		named := fields.ByName("slice") != nil || fields.ByName("snapshot") != nil || fields.ByName("snapshots") != nil
		if r.who == users && named != (r.names != nil) {
			t.Errorf("%s: its request names a slice or snapshot: %v; it is looked at: %v", path, named, r.names != nil)
		}
		if fields.ByName("overcommit") != nil && r.operator == nil {
			t.Errorf("%s: anybody may overcommit", path)
		}
		// What the row calls must fit the message.
		kind, err := protoregistry.GlobalTypes.FindMessageByName(m.Input().FullName())
		if err != nil {
			t.Fatal(err)
		}
		message := kind.New().Interface()
		if r.names != nil {
			for _, name := range r.names(message) {
				if name != "" {
					t.Errorf("%s: an empty request names slice %q", path, name)
				}
			}
		}
		if r.operator != nil && r.operator(message) != "" {
			t.Errorf("%s: an empty request takes an operator", path)
		}
	})
	for path := range table {
		if !seen[path] {
			t.Errorf("%s has a row, and does not exist", path)
		}
	}
	if n := strings.Count(string(doc), "\n| `"); n != len(table) {
		t.Errorf("docs/api.md has %d rows, want %d", n, len(table))
	}
}

func TestRoles(t *testing.T) {
	for role, want := range map[trust.Role][3]bool{
		trust.Operator: {true, true, true}, trust.Experimenter: {false, true, true}, "": {false, false, true}, "root": {false, false, true},
	} {
		if got := [3]bool{operators.allows(role), users.allows(role), strangers.allows(role)}; got != want {
			t.Errorf("%q: %v, want %v", role, got, want)
		}
	}
	alice := Caller{"alice", trust.Experimenter}
	for _, test := range []struct {
		who   Caller
		owner string
		want  bool
	}{
		{alice, "alice", true}, {alice, "bob", false}, {alice, "", false},
		{Caller{"", trust.Experimenter}, "", false}, {Caller{}, "", false}, {Caller{"op", trust.Operator}, "alice", true}, {Caller{Role: trust.Operator}, "", true},
	} {
		if test.who.Owns(test.owner) != test.want {
			t.Errorf("%v owns what is %q's: %v", test.who, test.owner, !test.want)
		}
	}
}

func TestSliceOf(t *testing.T) {
	for ref, want := range map[string]string{"a@1": "a", "a@": "a", "a": "", "": "", "@1": "", "a@b@c": "a"} {
		if got := sliceOf(ref); got != want {
			t.Errorf("%q is of %q, want %q", ref, got, want)
		}
	}
}
