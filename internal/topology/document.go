package topology

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// Limits of a document. They are far above any topology that people write, and
// keep a hostile one from costing more than its size.
const (
	maxSource  = 1 << 20 // bytes
	maxEntries = 1 << 16 // fields and list elements, counting each use of an alias
	maxFlow    = 32      // depth of [ and {
	maxColumn  = 1000    // of a block's key or dash, which bounds the depth of blocks
	maxAliases = 16      // from one alias to the next
)

// position is a place in the file.
type position struct{ line, column int }

// entry is a field of a mapping or an element of a sequence.
type entry struct {
	name  string // the field's
	path  string // from the top of the file
	at    position
	value ast.Node // with aliases followed; nil for none (null)

	unresolved bool // the value is nil because of a problem that is reported
}

// document is a parsed YAML file in which problems are collected.
type document struct {
	file     string
	anchors  map[string]ast.Node
	entries  int
	problems []Problem
}

func (d *document) problem(at position, field, message, hint string) {
	d.problems = append(d.problems, Problem{
		File: d.file, Line: at.line, Column: at.column,
		Field: field, Message: message, Hint: hint,
	})
}

// wrong reports a mistake in an entry's value.
func (d *document) wrong(e entry, message, hint string) {
	d.problem(e.valueAt(), e.path, message, hint)
}

// valueAt is where the value is, or the field if it has none.
func (e entry) valueAt() position {
	if e.value == nil {
		return e.at
	}
	return start(e.value)
}

// root parses the source and returns its only document.
func (d *document) root(src []byte) (entry, bool) {
	top := entry{at: position{1, 1}}
	if len(src) > maxSource {
		d.problem(top.at, "", fmt.Sprintf("the file has %d bytes, more than %d", len(src), maxSource), "this is no topology")
		return top, false
	}
	tokens := lexer.Tokenize(string(src))
	if at, ok := shallow(tokens); !ok {
		d.problem(at, "", "nested too deeply", "this is no topology")
		return top, false
	}
	file, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey()) // duplicates are ours to tell
	if err != nil {
		at, message := syntaxError(err)
		d.problem(at, "", "not valid YAML: "+message, "correct the syntax here or just above")
		return top, false
	}

	var bodies []ast.Node
	for _, doc := range file.Docs {
		if doc.Body != nil {
			bodies = append(bodies, doc.Body)
		}
	}
	switch len(bodies) {
	case 0:
		d.problem(top.at, "", "the file is empty", "start with version: 1")
		return top, false
	case 1:
	default:
		d.problem(start(bodies[1]), "", "a second document", "write one topology a file")
		return top, false
	}
	d.anchors = make(map[string]ast.Node)
	ast.Walk(anchorVisitor(d.anchors), bodies[0])
	d.resolve(&top, bodies[0])
	if top.value == nil && !top.unresolved {
		d.problem(top.at, "", "the file is empty", "start with version: 1")
	}
	return top, top.value != nil
}

// syntaxError is where a YAML text is wrong, and how, in one line.
func syntaxError(err error) (position, string) {
	var syntax *yaml.SyntaxError
	if errors.As(err, &syntax) {
		return place(syntax.Token), oneLine(syntax.Message)
	}
	return position{1, 1}, oneLine(err.Error())
}

// shallow tells whether parsing the tokens needs no deep recursion.
func shallow(tokens token.Tokens) (position, bool) {
	flow := 0
	for _, t := range tokens {
		switch t.Type {
		case token.SequenceStartType, token.MappingStartType:
			flow++
		case token.SequenceEndType, token.MappingEndType:
			flow--
		case token.SequenceEntryType, token.MappingKeyType, token.MappingValueType:
			if flow == 0 && t.Position.Column > maxColumn {
				return place(t), false
			}
		}
		if flow > maxFlow {
			return place(t), false
		}
	}
	return position{}, true
}

type anchorVisitor map[string]ast.Node

func (v anchorVisitor) Visit(n ast.Node) ast.Visitor {
	if a, ok := n.(*ast.AnchorNode); ok && a.Name != nil && a.Value != nil {
		v[a.Name.GetToken().Value] = a.Value
	}
	return v
}

// resolve sets the entry's value to n, or to what n stands for if it is an alias.
func (d *document) resolve(e *entry, n ast.Node) {
	e.value, e.unresolved = d.follow(*e, n)
}

// follow follows anchors and aliases to what they stand for. Null is nil, and
// so is what could not be followed, which is reported.
func (d *document) follow(e entry, n ast.Node) (value ast.Node, reported bool) {
	for range maxAliases {
		switch v := n.(type) {
		case nil, *ast.NullNode:
			return nil, false
		case *ast.AnchorNode:
			n = v.Value
		case *ast.AliasNode:
			name := v.Value.GetToken().Value
			target, ok := d.anchors[name]
			if !ok {
				d.problem(start(v), e.path, fmt.Sprintf("alias *%s stands for nothing", plain(name)), fmt.Sprintf("mark what it stands for with &%s", plain(name)))
				return nil, true
			}
			n = target
		case *ast.TagNode:
			d.problem(start(v), e.path, fmt.Sprintf("tag %s has no meaning here", plain(v.GetToken().Value)), "leave it out")
			return nil, true
		default:
			return n, false
		}
	}
	d.wrong(e, "aliases stand for each other", "write the value out")
	return nil, true
}

// enter counts an entry against the limit.
func (d *document) enter(e entry) bool {
	d.entries++
	if d.entries == maxEntries+1 {
		d.wrong(e, fmt.Sprintf("more than %d fields and list elements", maxEntries), "this is no topology")
	}
	return d.entries <= maxEntries
}

// mapping returns the fields of e in the order of the file, those of merge keys
// last. A field given twice is reported, and returned twice so that the mistakes
// in it are told as well; one of a merge key gives way. Null is an empty mapping;
// anything else is reported, and not ok.
func (d *document) mapping(e entry) (fields []entry, ok bool) {
	if e.value == nil {
		return nil, true
	}
	seen := make(map[string]position)
	ok = d.fields(e, e.value, maxAliases, func(f entry, merged bool) {
		first, dup := seen[f.name]
		if dup && merged {
			return
		}
		fields = append(fields, f)
		if dup {
			d.problem(f.at, f.path, fmt.Sprintf("%s is given twice", f.label()), fmt.Sprintf("remove this one or that in line %d", first.line))
			return
		}
		seen[f.name] = f.at
	})
	return fields, ok
}

func (d *document) fields(e entry, n ast.Node, depth int, yield func(f entry, merged bool)) bool {
	values, ok := pairs(n)
	if !ok {
		d.problem(start(n), e.path, fmt.Sprintf("%s is %s, not a mapping", e.label(), kind(n)), "write it as key: value")
		return false
	}
	var merges []ast.Node
	for _, v := range values {
		if v.Key.IsMergeKey() {
			merges = append(merges, v.Value)
			continue
		}
		f := entry{name: scalarText(v.Key), at: start(v.Key)}
		f.path = f.name
		if e.path != "" {
			f.path = e.path + "." + f.name
		}
		if !d.enter(f) {
			return true
		}
		d.resolve(&f, v.Value)
		yield(f, depth < maxAliases)
	}
	for _, m := range merges {
		if depth == 0 {
			d.problem(start(m), e.path, "merge keys refer to each other", "write the fields out")
			return true
		}
		targets := []ast.Node{m}
		if v, _ := d.follow(e, m); v != nil {
			if seq, ok := v.(*ast.SequenceNode); ok {
				targets = seq.Values
			}
		}
		for _, t := range targets {
			if !d.enter(e) {
				return true
			}
			if v, _ := d.follow(e, t); v != nil {
				d.fields(e, v, depth-1, yield)
			}
		}
	}
	return true
}

// record returns the fields of e by name. Those that are not known are reported.
// It is nil if e is no mapping.
func (d *document) record(e entry, known ...string) map[string]entry {
	list, ok := d.mapping(e)
	if !ok {
		return nil
	}
	fields := make(map[string]entry)
	for _, f := range list {
		if _, dup := fields[f.name]; dup {
			continue
		}
		fields[f.name] = f
		if !slices.Contains(known, f.name) {
			d.problem(f.at, f.path, fmt.Sprintf("unknown field %s", quoted(f.name)), suggest(f.name, known))
		}
	}
	return fields
}

// sequence returns the elements of e. Null is an empty list; anything else is
// reported, and not ok.
func (d *document) sequence(e entry) (elements []entry, ok bool) {
	if e.value == nil {
		return nil, true
	}
	seq, ok := e.value.(*ast.SequenceNode)
	if !ok {
		d.wrong(e, fmt.Sprintf("%s is %s, not a list", e.label(), kind(e.value)), "write it as [a, b] or with a dash an element")
		return nil, false
	}
	for i, v := range seq.Values {
		el := entry{name: fmt.Sprintf("%s[%d]", e.name, i), path: fmt.Sprintf("%s[%d]", e.path, i), at: e.valueAt()}
		if v != nil {
			el.at = start(v)
		}
		if !d.enter(el) {
			break
		}
		d.resolve(&el, v)
		elements = append(elements, el)
	}
	return elements, true
}

// text returns a scalar as it is written, without quotes.
func (d *document) text(e entry, hint string) (string, bool) {
	if e.value == nil {
		if !e.unresolved {
			d.wrong(e, fmt.Sprintf("%s has no value", e.label()), hint)
		}
		return "", false
	}
	if _, ok := e.value.(ast.ScalarNode); !ok {
		d.wrong(e, fmt.Sprintf("%s is %s, not a single value", e.label(), kind(e.value)), hint)
		return "", false
	}
	return scalarText(e.value), true
}

// label names the entry in a message.
func (e entry) label() string {
	if e.path == "" {
		return "the file"
	}
	return plain(e.name)
}

func pairs(n ast.Node) ([]*ast.MappingValueNode, bool) {
	switch n := n.(type) {
	case *ast.MappingNode:
		return n.Values, true
	case *ast.MappingValueNode:
		return []*ast.MappingValueNode{n}, true
	default:
		return nil, false
	}
}

func kind(n ast.Node) string {
	switch n.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		return "a mapping"
	case *ast.SequenceNode:
		return "a list"
	default:
		return "a single value"
	}
}

// scalarText is the text of a scalar or a key. Numbers and such are taken as
// they are written: 1_000 or 0x10 mean something else to each reader of YAML.
func scalarText(n ast.Node) string {
	switch n := n.(type) {
	case *ast.StringNode:
		return n.Value
	case *ast.LiteralNode:
		return n.Value.Value
	case *ast.MappingKeyNode:
		if n.Value != nil {
			return scalarText(n.Value)
		}
		return ""
	default:
		return n.GetToken().Value
	}
}

// start is where a node begins, which for a mapping is not its token, the colon.
func start(n ast.Node) position {
	switch v := n.(type) {
	case *ast.MappingNode:
		if !v.IsFlowStyle && len(v.Values) > 0 {
			return start(v.Values[0])
		}
	case *ast.MappingValueNode:
		return start(v.Key)
	}
	return place(n.GetToken())
}

func place(t *token.Token) position {
	if t == nil || t.Position == nil {
		return position{1, 1}
	}
	return position{max(t.Position.Line, 1), max(t.Position.Column, 1)}
}

// plain is a word of the file for a message, in quotes if it needs them.
func plain(s string) string {
	if q := quoted(s); s == "" || q != `"`+s+`"` {
		return q
	}
	return s
}

// quoted is a word of the file for a message, of bounded length.
func quoted(s string) string {
	const most = 80
	if len(s) > most {
		return fmt.Sprintf("%.*q...", most, s)
	}
	return fmt.Sprintf("%q", s)
}

func oneLine(s string) string {
	s, _, _ = strings.Cut(s, "\n")
	return strings.ToValidUTF8(s, "?")
}
