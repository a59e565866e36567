package catalog

import (
	"context"
	"encoding/json"
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
	err := json.Unmarshal(doc, &d)
	switch {
	case err != nil:
	case d.Format != hostFormat:
		err = fmt.Errorf("format %q, want %q", d.Format, hostFormat)
	case d.Version > hostVersion:
		return nil, fmt.Errorf("host's record has format version %d, this violin reads version %d; use a later violin", d.Version, hostVersion)
	case d.Host == nil:
		err = errors.New("there is no host in it")
	case d.Host.Name != name:
		err = fmt.Errorf("it is of host %q", d.Host.Name)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", store.ErrDamaged, err)
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
		var doc []byte
		if doc, err = json.MarshalIndent(hostDocument{hostFormat, hostVersion, h}, "", "  "); err == nil {
			err = c.st.ReplaceDocument(ctx, hostName(h.Name), append(doc, '\n'))
		}
	}
	if err != nil {
		return fmt.Errorf("record of host %q: %w", h.Name, err)
	}
	return nil
}

// Hosts returns what is kept of hosts, by name. What cannot be read is told, and left out.
func (c *Catalog) Hosts(ctx context.Context, damaged func(host string, err error)) (map[string]*Host, error) {
	out := map[string]*Host{}
	for doc, err := range c.st.Documents(ctx, hostDir) {
		if err != nil {
			return nil, fmt.Errorf("list records of hosts: %w", err)
		}
		name := strings.TrimSuffix(strings.TrimPrefix(doc, hostDir+"/"), ".json")
		b, err := c.st.GetDocument(ctx, doc)
		var h *Host
		if err == nil {
			h, err = parseHost(b, name)
		}
		if err != nil {
			damaged(name, fmt.Errorf("record of host %q: %w", name, err))
			continue
		}
		out[name] = h
	}
	return out, nil
}
