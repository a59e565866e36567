package topology

import (
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"path"
	"slices"
	"strings"
	"unicode"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
)

// MaxUserData bounds what a user tells cloud-init, in bytes.
const MaxUserData = 256 << 10

const (
	maxShares = 8
	maxKeys   = 64
)

// userDataHint says what user data is.
const userDataHint = "begin it with #cloud-config, #!/bin/sh, or what else cloud-init knows; a file's path is user_data_file"

// userDataBegins are the beginnings that cloud-init knows a kind of user data by.
var userDataBegins = []string{
	"#cloud-config", "#!", "#include", "#cloud-boothook", "#part-handler", "#upstart-job", "## template: jinja", "Content-Type:", "MIME-Version:", "From nobody",
}

// CheckUserData tells what of a text cloud-init would not take.
func CheckUserData(text string) error {
	switch {
	case len(text) > MaxUserData:
		return fmt.Errorf("user data has %d bytes, more than %d", len(text), MaxUserData)
	case strings.ToValidUTF8(text, "") != text || strings.ContainsFunc(text, func(c rune) bool {
		return unicode.IsControl(c) && !strings.ContainsRune("\n\t\r", c)
	}):
		return fmt.Errorf("user data has characters that can't be printed")
	case !slices.ContainsFunc(userDataBegins, func(b string) bool { return strings.HasPrefix(text, b) }):
		line, _, _ := strings.Cut(text, "\n")
		return fmt.Errorf("user data begins with %s, of which cloud-init knows nothing", quoted(line))
	}
	// Such as an archive is a list, and a template is none yet.
	if first, _, _ := strings.Cut(text, "\n"); strings.TrimSpace(first) != "#cloud-config" {
		return nil
	}
	tokens := lexer.Tokenize(text)
	if at, ok := shallow(tokens); !ok {
		return fmt.Errorf("user data is nested too deeply in its line %d", at.line)
	}
	file, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		at, message := syntaxError(err)
		return fmt.Errorf("user data is no valid YAML in its line %d: %s", at.line, message)
	}
	for _, doc := range file.Docs {
		if doc.Body == nil {
			continue
		}
		switch doc.Body.(type) {
		case *ast.MappingNode, *ast.MappingValueNode, *ast.CommentGroupNode, *ast.NullNode:
		default:
			return fmt.Errorf("user data is %s, and a #cloud-config is a mapping", kind(doc.Body))
		}
	}
	return nil
}

// cloudInit reads what a node's cloud-init is told.
func (r *reader) cloudInit(v entry, node *Node) {
	const hint = "write cloud_init: {ssh_keys: [...], user_data: ...}, or cloud_init: false for none"
	c := &CloudInit{}
	node.CloudInit = c
	if _, ok := pairs(v.value); !ok {
		switch s, ok := r.text(v, hint); {
		case !ok:
		case s == "false":
			c.Off = true
		case s != "true":
			r.wrong(v, fmt.Sprintf("cloud_init %s is not known", quoted(s)), hint)
		}
		return
	}
	f := r.record(v, "user_data", "user_data_file", "ssh_keys")
	if u, ok := f["user_data"]; ok {
		if s, ok := r.text(u, userDataHint); ok {
			if err := CheckUserData(s); err != nil {
				r.wrong(u, err.Error(), userDataHint)
			}
			c.UserData = s
		}
	}
	if u, ok := f["user_data_file"]; ok {
		if c.UserDataFile, ok = r.line(f, "user_data_file"); ok && c.UserDataFile == "" {
			r.wrong(u, "user_data_file is empty", "give the path of a file, or leave it out")
		}
		if _, both := f["user_data"]; both {
			r.problem(u.at, u.path, "user_data_file beside user_data", "give the one or the other")
		}
	}
	if k, ok := f["ssh_keys"]; ok {
		const hint = "write keys as in id_ed25519.pub, such as [ssh-ed25519 AAAA... alice]"
		elements, _ := r.sequence(k)
		if len(elements) > maxKeys {
			r.wrong(k, fmt.Sprintf("%d keys, more than %d", len(elements), maxKeys), "remove some")
		}
		for _, el := range elements {
			s, ok := r.text(el, hint)
			if ok {
				s, ok = r.oneLine(el, strings.TrimSpace(s))
			}
			if !ok {
				continue
			}
			if err := checkKey(s); err != nil {
				r.wrong(el, err.Error(), hint)
			}
			c.Keys = append(c.Keys, s)
		}
	}
}

// checkKey tells whether a text is a public key as ssh writes it.
func checkKey(s string) error {
	if strings.Contains(s, "PRIVATE KEY") {
		return fmt.Errorf("that is a private key, which nobody else should see")
	}
	fields := strings.Fields(s)
	if len(fields) < 2 {
		return fmt.Errorf("%s is no public ssh key", quoted(s))
	}
	blob, err := base64.StdEncoding.DecodeString(fields[1])
	if err != nil || len(blob) < 4 {
		return fmt.Errorf("%s is no public ssh key: its second word is not one in base64", quoted(s))
	}
	// It begins with its kind, after the length of that (RFC 4253, 6.6).
	n := binary.BigEndian.Uint32(blob)
	if n > uint32(len(blob)-4) || string(blob[4:4+n]) != fields[0] {
		return fmt.Errorf("%s is no public ssh key: it does not say inside that it is %s", quoted(s), quoted(fields[0]))
	}
	return nil
}

// shares reads the directories that a node sees.
func (r *reader) shares(e entry, node *Node) {
	const hint = "write {name: tools, directory: ./tools, mount: /opt/tools}"
	elements, _ := r.sequence(e)
	if len(elements) > maxShares {
		r.wrong(e, fmt.Sprintf("%d shares, more than the %d there is room for", len(elements), maxShares), "remove some, or put them into one directory")
	}
	names, mounts := make(map[string]int), make(map[string]int)
	for _, el := range elements {
		f := r.record(el, "name", "directory", "mount")
		var s Share
		if v, ok := r.required(el, f, "name", hint); ok {
			s.Name = r.diskName(v, "share", hint, names)
			if slices.ContainsFunc(node.Disks, func(d Disk) bool { return d.Name == s.Name }) || s.Name == SeedDisk || s.Name == RootDisk {
				r.wrong(v, fmt.Sprintf("there is a disk %s", quoted(s.Name)), "give the share another name: the guest sees it as a disk of that serial number")
			}
		}
		if v, ok := r.required(el, f, "directory", hint); ok {
			if s.Directory, ok = r.line(f, "directory"); ok && s.Directory == "" {
				r.wrong(v, "directory is empty", hint)
			}
		}
		if v, ok := f["mount"]; ok {
			s.Mount, ok = r.line(f, "mount")
			line, dup := mounts[s.Mount]
			switch {
			case !ok:
			case !path.IsAbs(s.Mount) || path.Clean(s.Mount) != s.Mount || s.Mount == "/":
				r.wrong(v, fmt.Sprintf("mount %s is no absolute path of a directory", quoted(s.Mount)), "write it from / on and without . and .., or leave it out")
			case dup:
				r.wrong(v, fmt.Sprintf("something is mounted at %s already", s.Mount), fmt.Sprintf("choose another place than that in line %d", line))
			default:
				mounts[s.Mount] = v.valueAt().line
			}
		}
		node.Shares = append(node.Shares, s)
	}
}
