// Package house holds the repository to its own rules.
package house

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const root = "../.."

// imports are what each package may import of ours: ARCHITECTURE.md's table. An import
// that is not here is either a mistake or a change of plan, to be made in both places.
var imports = map[string][]string{
	"cmd/violin": {"api", "internal/access", "internal/bench", "internal/daemon", "internal/frames", "internal/image", "internal/keeper", "internal/metadata", "internal/remote", "internal/server", "internal/store", "internal/topology", "internal/trust"},
	"demo":       {},

	"internal/daemon":      {},
	"internal/server":      {"api", "internal/*"},
	"internal/coordinator": {"internal/agent", "internal/certificate", "internal/cut", "internal/hypervisor/qemu", "internal/store"},
	"internal/agent": {
		"internal/certificate", "internal/child", "internal/coloring", "internal/cut", "internal/fabric", "internal/frames",
		"internal/gateway", "internal/hypervisor/qemu", "internal/keeper",
		"internal/migration/qemu", "internal/pageserver", "internal/priority", "internal/qga", "internal/record", "internal/store",
	},
	"internal/lab":     {"internal/machine"},
	"internal/machine": {},
	"internal/trust":   {},
	"internal/access":  {"api", "internal/trust"},
	"internal/remote": {
		"api", "internal/agent", "internal/certificate", "internal/coloring", "internal/cut", "internal/fabric", "internal/frames", "internal/gateway",
		"internal/hypervisor/qemu", "internal/image", "internal/machine", "internal/migration/qemu", "internal/pageserver", "internal/priority", "internal/qga", "internal/record", "internal/store", "internal/trust",
	},
	"internal/gateway":         {},
	"internal/fabric":          {"internal/child", "internal/coloring", "internal/cut", "internal/openflow", "internal/priority", "internal/record"},
	"internal/hypervisor/qemu": {"internal/child", "internal/priority", "internal/qcow2", "internal/qmp", "internal/topology"},
	"internal/admission":       {},
	"internal/placement":       {"internal/admission"},
	"internal/image":           {"internal/qcow2", "internal/topology"},
	"internal/cloudinit":       {"internal/topology"},
	"internal/share":           {},
	"internal/catalog":         {"internal/store"},
	"internal/transfer":        {"internal/catalog", "internal/store"},
	"internal/bench":           {"api", "internal/agent", "internal/coordinator", "internal/cut", "internal/hypervisor/qemu", "internal/machine", "internal/migration/qemu", "internal/pageserver", "internal/priority", "internal/store"},
	"internal/certificate":     {"internal/topology"}, // it shares nothing with what it checks
	"internal/store":           {"internal/pagehash"},
	"internal/store/storetest": {"internal/store"},
	"internal/metadata":        {"internal/store"},
	"internal/pagehash":        {},
	"internal/events":          {},
	"internal/webhook":         {},
	"internal/protection":      {"internal/catalog"},
	"internal/priority":        {},
	"internal/keeper":          {"internal/coloring", "internal/openflow"},
	"internal/child":           {},
	"internal/record":          {},

	"internal/metadata/etcdtest":   {},
	"internal/cut":                 {},
	"internal/coloring":            {"internal/cut", "internal/openflow"},
	"internal/openflow":            {},
	"internal/openflow/softswitch": {"internal/openflow"},
	"internal/qmp":                 {},
	"internal/qcow2":               {},
	"internal/qga":                 {"internal/qmp"},
	"internal/migration/qemu":      {},
	"internal/pageserver":          {"internal/migration/qemu"},
	"internal/frames":              {"internal/cut"},
	"internal/topology":            {},
}

// pure are the packages that know no clock, no disk and no process: what they do is
// a function of what they are given. (The wire packages are given a connection.)
var pure = map[string][]string{
	"internal/admission":      {"net", "os", "syscall", "math/rand", "log", "time"},
	"internal/protection":     {"net", "os", "syscall", "math/rand", "log"},
	"internal/placement":      {"net", "os", "syscall", "math/rand", "log", "time"},
	"internal/cut":            {"net", "os", "syscall", "math/rand", "log"},
	"internal/coloring":       {"os", "syscall", "math/rand", "log"},
	"internal/frames":         {"net", "os", "syscall", "math/rand", "log"},
	"internal/migration/qemu": {"net", "os", "syscall", "math/rand", "log"},
	"internal/qcow2":          {"net", "os", "syscall", "math/rand", "log", "time"},
	"internal/pageserver":     {"net", "os", "syscall", "math/rand", "log", "time"},
	"internal/topology":       {"os", "syscall", "math/rand", "log"},
}

func TestImports(t *testing.T) {
	seen := map[string]bool{}
	each(t, func(dir, file string, imported []string) {
		if dir == "api/violin/v1" || strings.HasPrefix(dir, "api/") || strings.HasPrefix(dir, "test/") {
			return
		}
		allowed, ok := imports[dir]
		if !ok {
			t.Errorf("%s: package %s is in no row of the plan", file, dir)
			return
		}
		seen[dir] = true
		for _, path := range imported {
			ours, ok := strings.CutPrefix(path, "violin/")
			if !ok {
				if slices.ContainsFunc(pure[dir], func(no string) bool { return path == no || strings.HasPrefix(path, no+"/") }) {
					t.Errorf("%s imports %s, but %s is pure", file, path, dir)
				}
				continue
			}
			if !slices.ContainsFunc(allowed, func(a string) bool {
				return a == ours || a == "api" && strings.HasPrefix(ours, "api/") || a == "internal/*" && strings.HasPrefix(ours, "internal/")
			}) {
				t.Errorf("%s imports %s: %s may import %v", file, path, dir, allowed)
			}
		}
	})
	for dir := range imports {
		if !seen[dir] {
			t.Errorf("the plan has a package %s, the tree has not", dir)
		}
	}
}

// Names that say nothing about what a package owns.
func TestNames(t *testing.T) {
	each(t, func(dir, file string, _ []string) {
		switch filepath.Base(dir) {
		case "util", "utils", "common", "helpers", "types", "misc", "errors":
			t.Errorf("%s: %q names no thing that a package could own", file, filepath.Base(dir))
		}
	})
}

// each calls f for every Go file that is no test, with what it imports.
func each(t *testing.T, f func(dir, file string, imported []string)) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && strings.HasPrefix(d.Name(), ".") && path != root {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		file, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		var imported []string
		for _, i := range parsed.Imports {
			p, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				return err
			}
			imported = append(imported, p)
		}
		f(filepath.ToSlash(filepath.Dir(file)), file, imported)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
