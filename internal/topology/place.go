package topology

import "strings"

// Place gives an error that is found only where a topology is put to use its place in
// the file: that of a field, such as nodes.db.disks[0].base, or, if it is not there, of
// the nearest one that it would be in. The result is an [*Error].
func Place(file string, src []byte, field string, err error) error {
	d := document{file: file}
	at := position{1, 1}
	if e, ok := d.root(src); ok {
		at = d.find(e, field)
	}
	return &Error{Problems: []Problem{{File: file, Line: at.line, Column: at.column, Field: field, Message: err.Error()}}}
}

// find is where a field is: its value, or the entry that has no such field.
func (d *document) find(e entry, field string) position {
	if e.path == field {
		return e.valueAt()
	}
	var inner []entry
	if _, ok := pairs(e.value); ok {
		inner, _ = d.mapping(e)
	} else if e.value != nil && kind(e.value) == "a list" {
		inner, _ = d.sequence(e)
	}
	for _, i := range inner {
		if rest, ok := strings.CutPrefix(field, i.path); ok && (rest == "" || rest[0] == '.' || rest[0] == '[') {
			return d.find(i, field)
		}
	}
	return e.at
}
