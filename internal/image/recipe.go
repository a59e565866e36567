package image

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"

	"violin/internal/topology"
)

// Recipe says what an image is made of: see the package's documentation.
type Recipe struct {
	Version  int      `yaml:"version"`
	Kernel   string   `yaml:"kernel"`
	Modules  []string `yaml:"modules"`
	Packages []string `yaml:"packages"`
	Files    []File   `yaml:"files"`
	Commands []string `yaml:"commands"`
	Boot     string   `yaml:"boot"`                   // kernel, which is the default, or disk
	Size     string   `yaml:"size"`                   // of a disk's root file system, such as 1GiB, which is the default
	Init     string   `yaml:"init" json:",omitempty"` // violin, which is the default, or systemd
}

// What a recipe's Boot can be.
const (
	bootKernel = "kernel"
	bootDisk   = "disk"
)

// What a recipe's Init can be: what brings the guest up, and reads what it is.
const (
	initViolin  = "violin"  // busybox and /etc/violin/boot
	initSystemd = "systemd" // Debian's, and cloud-init, as in images of clouds
)

// defaultSize is that of a disk's root file system, in bytes.
const defaultSize = 1 << 30

// The bounds of a disk's root file system, in bytes.
const (
	minSize = 64 << 20
	maxSize = 16 << 40
)

// size is the Size, in bytes, of a recipe that was checked.
func (r *Recipe) size() int64 {
	if r.Size == "" {
		return defaultSize
	}
	n, err := topology.ParseSize(r.Size)
	if err != nil {
		panic(err) // ParseRecipe has checked it
	}
	return int64(n)
}

// File is a file that a recipe adds, or replaces.
type File struct {
	Path    string  `yaml:"path"`
	From    string  `yaml:"from"` // relative to the recipe
	Content *string `yaml:"content"`
	Mode    Mode    `yaml:"mode"` // by default 644, or that of From
}

// Mode is a file's mode as it is written: octal, with or without a leading 0.
type Mode string

// UnmarshalYAML takes the text as it is: YAML would read some octal numbers as decimal.
func (m *Mode) UnmarshalYAML(text []byte) error {
	*m = Mode(strings.Trim(strings.TrimSpace(string(text)), `"'`))
	return nil
}

// defaultKernel depends on the newest of the kernels that are made for VMs.
const defaultKernel = "linux-image-cloud-amd64"

// RecipeError is a mistake in a recipe, and where it is.
type RecipeError struct {
	File         string
	Line, Column int
	Message      string
}

func (e *RecipeError) Error() string {
	return fmt.Sprintf("%s:%d:%d: %s", e.File, e.Line, e.Column, e.Message)
}

// maxRecipe bounds a recipe, in bytes.
const maxRecipe = 1 << 20

// ParseRecipe reads a recipe. The file's name is for errors, which are
// [RecipeError]s, joined.
func ParseRecipe(file string, src []byte) (*Recipe, error) {
	top := func(format string, args ...any) error {
		return &RecipeError{File: file, Line: 1, Column: 1, Message: fmt.Sprintf(format, args...)}
	}
	if len(src) > maxRecipe {
		return nil, top("it has %d bytes, more than %d: this is no recipe", len(src), maxRecipe)
	}
	doc, err := parser.ParseBytes(src, 0)
	if err != nil {
		return nil, syntaxError(file, err)
	}
	if len(doc.Docs) != 1 || doc.Docs[0].Body == nil {
		return nil, top("one document is wanted, that begins with version: 1; there are %d", len(doc.Docs))
	}
	var r Recipe
	if err := yaml.NodeToValue(doc.Docs[0].Body, &r, yaml.Strict()); err != nil {
		return nil, syntaxError(file, err)
	}
	c := checker{file: file, doc: doc}
	c.recipe(&r)
	if err := errors.Join(c.errs...); err != nil {
		return nil, err
	}
	return &r, nil
}

// syntaxError gives an error of the YAML library its place.
func syntaxError(file string, err error) error {
	e := &RecipeError{File: file, Line: 1, Column: 1, Message: err.Error()}
	var y yaml.Error
	if errors.As(err, &y) {
		e.Message = strings.Join(strings.Fields(y.GetMessage()), " ")
		if t := y.GetToken(); t != nil && t.Position != nil {
			e.Line, e.Column = t.Position.Line, t.Position.Column
		}
	}
	return e
}

type checker struct {
	file string
	doc  *ast.File
	errs []error
}

// wrong reports a mistake in what a YAML path names.
func (c *checker) wrong(where, format string, args ...any) {
	e := &RecipeError{File: c.file, Line: 1, Column: 1, Message: strings.TrimPrefix(where, "$.") + ": " + fmt.Sprintf(format, args...)}
	if p, err := yaml.PathString(where); err == nil {
		if n, err := p.FilterFile(c.doc); err == nil && n != nil && n.GetToken() != nil {
			e.Line, e.Column = n.GetToken().Position.Line, n.GetToken().Position.Column
		}
	}
	c.errs = append(c.errs, e)
}

var (
	packageName = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]+$`)
	moduleName  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]*$`)
)

func (c *checker) recipe(r *Recipe) {
	if r.Version != 1 {
		c.wrong("$.version", "%d is none of this program's versions; write version: 1", r.Version)
	}
	if r.Kernel == "" {
		r.Kernel = defaultKernel
	}
	if !packageName.MatchString(r.Kernel) {
		c.wrong("$.kernel", "%q is no name of a Debian package", r.Kernel)
	}
	if r.Boot == "" {
		r.Boot = bootKernel
	}
	switch {
	case r.Boot != bootKernel && r.Boot != bootDisk:
		c.wrong("$.boot", "%q is neither %s nor %s", r.Boot, bootKernel, bootDisk)
	case r.Size == "":
	case r.Boot != bootDisk:
		c.wrong("$.size", "it is that of a disk; write boot: %s as well, or leave it out", bootDisk)
	default:
		if n, err := topology.ParseSize(r.Size); err != nil {
			c.wrong("$.size", "%q: %v; write it such as 2GiB", r.Size, err)
		} else if n < minSize || n > maxSize {
			c.wrong("$.size", "%s is not between %d MiB and %d TiB", r.Size, minSize>>20, uint64(maxSize)>>40)
		}
	}
	switch {
	case r.Init == "", r.Init == initViolin:
		r.Init = "" // as in recipes of before there was a choice, which are to stay the same
	case r.Init != initSystemd:
		c.wrong("$.init", "%q is neither %s nor %s", r.Init, initViolin, initSystemd)
	case r.Boot != bootDisk:
		c.wrong("$.init", "%s needs a disk of its own; write boot: %s as well", initSystemd, bootDisk)
	}
	for i, m := range r.Modules {
		if !moduleName.MatchString(m) {
			c.wrong(fmt.Sprintf("$.modules[%d]", i), "%q is no name of a kernel module", m)
		}
	}
	for i, p := range r.Packages {
		if !packageName.MatchString(p) {
			c.wrong(fmt.Sprintf("$.packages[%d]", i), "%q is no name of a Debian package", p)
		}
	}
	seen := map[string]bool{}
	for i := range r.Files {
		f := &r.Files[i]
		at := fmt.Sprintf("$.files[%d]", i)
		switch {
		case f.Path == "":
			c.wrong(at, "there is no path; say where in the image the file belongs")
			continue
		case !path.IsAbs(f.Path) || path.Clean(f.Path) != f.Path || f.Path == "/":
			c.wrong(at+".path", "%q is no absolute path of a file; write it from / on and without . and ..", f.Path)
		case seen[f.Path]:
			c.wrong(at+".path", "%s is there twice", f.Path)
		}
		seen[f.Path] = true
		if (f.From == "") == (f.Content == nil) {
			c.wrong(at, "%s: give either from (a file beside the recipe) or content", f.Path)
		}
		if f.Mode != "" {
			if _, err := f.mode(0); err != nil {
				c.wrong(at+".mode", "%q is no octal mode, such as 755", f.Mode)
			}
		}
	}
	for i, line := range r.Commands {
		if strings.TrimSpace(line) == "" || strings.ContainsRune(line, 0) {
			c.wrong(fmt.Sprintf("$.commands[%d]", i), "it is no command")
		}
	}
}

// mode is the file's mode, or what it is by default.
func (f *File) mode(otherwise fs.FileMode) (fs.FileMode, error) {
	if f.Mode == "" {
		return otherwise, nil
	}
	n, err := strconv.ParseUint(string(f.Mode), 8, 12)
	if err != nil || n > 0o777 { // set-user-ID and such are a command's to set
		return 0, fmt.Errorf("mode %q is no octal mode", f.Mode)
	}
	return fs.FileMode(n), nil
}
