package catalog

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"violin/internal/store"
)

const (
	hostDir     = "hosts"
	hostFormat  = "violin-host"
	hostVersion = 1
)

// A Host is what is kept of a host that has joined, beside who it is. One of which
// nothing is to be kept has none.
type Host struct {
	Name string `json:"name"`
	// Cordoned is since when nothing new comes up there.
	Cordoned time.Time `json:"cordoned"`
}

type hostDocument struct {
	Format  string `json:"format"`
	Version int    `json:"version"`
	Host    *Host  `json:"host"`
}

func hostName(name string) string { return hostDir + "/" + name + ".json" }

func parseHost(doc []byte, name string) (*Host, error) {
	var d hostDocument
	if err := parseNote(doc, "host's record", hostFormat, hostVersion, &d); err != nil {
		return nil, err
	}
	switch {
	case d.Host == nil:
		return nil, fmt.Errorf("%w: there is no host in it", store.ErrDamaged)
	case d.Host.Name != name:
		return nil, fmt.Errorf("%w: it is of host %q", store.ErrDamaged, d.Host.Name)
	}
	return d.Host, nil
}

// PutHost writes what is kept of a host in the place of what was, by one atomic write, or
// deletes that if there is nothing to keep.
func (c *Catalog) PutHost(ctx context.Context, h *Host) error {
	var err error
	switch {
	case h.Name == "" || strings.Contains(h.Name, "/"):
		err = errors.New("no host is called that") // what else a name can't be, the store says
	case h.Cordoned.IsZero():
		err = c.st.DeleteDocument(ctx, hostName(h.Name))
	default:
		err = c.replaceNote(ctx, hostName(h.Name), hostDocument{hostFormat, hostVersion, h})
	}
	if err != nil {
		return fmt.Errorf("record of host %q: %w", h.Name, err)
	}
	return nil
}

// Hosts returns what is kept of hosts, by name. What cannot be read is told, and left out.
func (c *Catalog) Hosts(ctx context.Context, damaged func(host string, err error)) (map[string]*Host, error) {
	return notes(ctx, c, hostDir, "host", damaged, parseHost)
}
