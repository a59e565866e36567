package trust

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Vault is where an authority keeps what it must not forget: its key and certificate,
// [keyName] and [certName], and what it remembers of hosts and users, hosts/NAME and
// users/NAME. Whoever leads has it to itself.
type Vault interface {
	// Read reads what was written under a name. The error of one that is not there wraps
	// [fs.ErrNotExist].
	Read(name string) ([]byte, error)
	// Write writes it, whole or not at all, in the place of what is there.
	Write(name string, data []byte) error
	// Names are the names in a directory, without that.
	Names(dir string) ([]string, error)
}

const (
	keyName  = "ca.key" // both PEM
	certName = "ca.crt"
)

// Directory is a vault of files for their owner only.
type Directory string

// Read implements [Vault].
func (d Directory) Read(name string) ([]byte, error) {
	return os.ReadFile(filepath.Join(string(d), filepath.FromSlash(name)))
}

// Write implements [Vault].
func (d Directory) Write(name string, data []byte) error {
	path := filepath.Join(string(d), filepath.FromSlash(name))
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return writeFile(path, data)
}

// Names implements [Vault].
func (d Directory) Names(dir string) ([]string, error) {
	files, err := os.ReadDir(filepath.Join(string(d), dir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var names []string
	for _, f := range files {
		names = append(names, f.Name())
	}
	return names, nil
}

// Move copies an authority that is in one vault into another, unless there is one or
// there is nothing to copy. It tells whether it did. The certificate comes last: one that
// was moved by half has none, and is moved anew.
func Move(from, to Vault) (bool, error) {
	for _, v := range []struct {
		vault Vault
		want  bool
	}{{from, true}, {to, false}} {
		switch _, err := v.vault.Read(certName); {
		case err != nil && !errors.Is(err, fs.ErrNotExist):
			return false, err
		case (err == nil) != v.want:
			return false, nil
		}
	}
	names := []string{keyName}
	for _, k := range []kind{hosts, users} {
		found, err := from.Names(string(k))
		if err != nil {
			return false, err
		}
		for _, n := range found {
			if CheckName(n) == nil {
				names = append(names, memberName(k, n))
			}
		}
	}
	for _, name := range append(names, certName) {
		data, err := from.Read(name)
		if err == nil {
			err = to.Write(name, data)
		}
		if err != nil {
			return false, fmt.Errorf("move %s of the certificate authority: %w", name, err)
		}
	}
	return true, nil
}
