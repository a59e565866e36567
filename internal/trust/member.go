package trust

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"
)

// kind is whom a certificate is for, and the directory of what is remembered of them.
type kind string

const (
	hosts kind = "hosts"
	users kind = "users"
)

func (k kind) String() string { return string(k[:len(k)-1]) }

// member is what the authority remembers of a host or a user, under its
// name: which of its certificates are good. A host has one of them, a user one for each
// login; while one is being renewed it has both.
type member struct {
	Role         Role     `json:"role,omitempty"` // of a user
	Certificates []issued `json:"certificates,omitempty"`
	// Removed is when it was put out, and zero if it is in: tokens that were made before
	// are not good for it.
	Removed time.Time `json:"removed,omitzero"`
}

type issued struct {
	Serial   string    `json:"serial"` // in hexadecimal digits
	Expires  time.Time `json:"expires,omitzero"`
	Replaces string    `json:"replaces,omitempty"` // a serial that is good until this one is used
}

func memberName(k kind, name string) string { return string(k) + "/" + name }

// read is what is remembered, which may be nothing. The caller holds members.
func (a *Authority) read(k kind, name string) (*member, error) {
	m := &member{}
	b, err := a.vault.Read(memberName(k, name))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return m, nil
	case err != nil:
		return nil, fmt.Errorf("%s %s: %w", k, name, err)
	case len(b) > 0 && b[0] != '{':
		// As the first violins wrote it: the serial number, and nothing else.
		m.Certificates = []issued{{Serial: string(b)}}
		return m, nil
	}
	if err := json.Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("%s %s: what is remembered cannot be read: %w", k, name, err)
	}
	return m, nil
}

// write remembers it. The caller holds members.
func (a *Authority) write(k kind, name string, m *member) error {
	now := time.Now()
	m.Certificates = slices.DeleteFunc(m.Certificates, func(c issued) bool { return !c.Expires.IsZero() && now.After(c.Expires) })
	b, err := json.MarshalIndent(m, "", "  ")
	if err == nil {
		err = a.vault.Write(memberName(k, name), append(b, '\n'))
	}
	if err != nil {
		return fmt.Errorf("note the certificates of %s %s: %w", k, name, err)
	}
	return nil
}

// list is everybody who has a certificate, by name. The caller holds members.
func (a *Authority) list(k kind) (map[string]*member, error) {
	names, err := a.vault.Names(string(k))
	if err != nil {
		return nil, fmt.Errorf("list the %s: %w", k, err)
	}
	all := map[string]*member{}
	for _, name := range names {
		if CheckName(name) != nil { // such as of a file that is being written
			continue
		}
		m, err := a.read(k, name)
		if err != nil {
			return nil, err
		}
		if len(m.Certificates) > 0 {
			all[name] = m
		}
	}
	return all, nil
}

// used tells whether a certificate is good. If it is, the one that it replaces no
// longer is: whoever has the new one has kept it. The caller holds members.
func (a *Authority) used(k kind, name string, m *member, cert *x509.Certificate) (bool, error) {
	serial := cert.SerialNumber.Text(16)
	i := slices.IndexFunc(m.Certificates, func(c issued) bool { return c.Serial == serial })
	if i < 0 {
		return false, nil
	}
	replaced := m.Certificates[i].Replaces
	if replaced == "" {
		return true, nil
	}
	m.Certificates[i].Replaces = ""
	m.Certificates = slices.DeleteFunc(m.Certificates, func(c issued) bool { return c.Serial == replaced })
	return true, a.write(k, name, m)
}

func (a *Authority) remove(k kind, name string) (bool, error) {
	if err := CheckName(name); err != nil {
		return false, err
	}
	a.members.Lock()
	defer a.members.Unlock()
	m, err := a.read(k, name)
	if err != nil || len(m.Certificates) == 0 {
		return false, err
	}
	return true, a.write(k, name, &member{Removed: time.Now().UTC()})
}
