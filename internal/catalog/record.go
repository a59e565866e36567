package catalog

import (
	"context"
	"errors"
	"fmt"
	"time"

	"violin/internal/store"
)

const (
	recordDir     = "slices"
	recordFormat  = "violin-slice"
	recordVersion = 4 // 2: with an owner, 3: with how long a host may be away, 4: with a protected fork's topology
)

// A Record is what is kept of a slice, beside its snapshots, for when its server is
// gone. A slice that needs none has none.
type Record struct {
	Slice string `json:"slice"`
	// Owner is the user whose the slice's name is, and with it what runs by it and its
	// snapshots; empty: the operators'.
	Owner string `json:"owner,omitempty"`
	// Suspended is set while the slice is suspended.
	Suspended *Suspension `json:"suspended,omitempty"`
	// Protection is set while the slice is protected.
	Protection *Protection `json:"protection,omitempty"`
}

// A Protection says how a slice is guarded, and what the guard has to remember.
type Protection struct {
	Every        time.Duration `json:"every_ns"`            // between checkpoints
	Keep         int           `json:"keep"`                // so many checkpoints
	MaxRollbacks int           `json:"max_rollbacks"`       // within Window
	Window       time.Duration `json:"window_ns"`           // ditto
	Webhook      string        `json:"webhook,omitempty"`   // URL; empty for none
	DryRun       bool          `json:"dry_run,omitempty"`   // tell of rollbacks, and do none
	Since        time.Time     `json:"since"`               // when it was protected
	Head         string        `json:"head,omitempty"`      // SLICE@ID that it descends from last; empty for none
	HeadAt       time.Time     `json:"head_at"`             // when that was so
	Rollbacks    []time.Time   `json:"rollbacks,omitempty"` // the recent ones
	GaveUp       bool          `json:"gave_up,omitempty"`   // there were too many
	// HostTimeout is how long a joined host may be away; 0 in records of before there was
	// a choice.
	HostTimeout time.Duration `json:"host_timeout_ns,omitempty"`
	// Topology is the slice's, in its canonical form, if Head is another's: a fork has an
	// edge of its own. Empty otherwise.
	Topology string `json:"topology,omitempty"`
}

// A Suspension is where a suspended slice goes on.
type Suspension struct {
	Snapshot string    `json:"snapshot"` // ID
	At       time.Time `json:"at"`
}

// Empty tells whether the record says nothing.
func (r *Record) Empty() bool { return r.Suspended == nil && r.Protection == nil && r.Owner == "" }

type recordDocument struct {
	Format  string  `json:"format"`
	Version int     `json:"version"`
	Record  *Record `json:"record"`
}

func recordName(slice string) string { return recordDir + "/" + slice + ".json" }

func parseRecord(doc []byte) (*Record, error) {
	damaged := func(err error) (*Record, error) { return nil, fmt.Errorf("%w: %w", store.ErrDamaged, err) }
	var d recordDocument
	if err := parseNote(doc, "slice's record", recordFormat, recordVersion, &d); err != nil {
		return nil, err
	}
	if d.Record == nil {
		return damaged(errors.New("there is no record in it"))
	}
	if err := CheckName(d.Record.Slice); err != nil {
		return damaged(err)
	}
	if s := d.Record.Suspended; s != nil {
		if err := checkID(s.Snapshot); err != nil {
			return damaged(err)
		}
	}
	return d.Record, nil
}

// PutRecord writes a slice's record in the place of the one that it has, by one
// atomic write, or deletes it if it says nothing.
func (c *Catalog) PutRecord(ctx context.Context, r *Record) error {
	err := CheckName(r.Slice)
	switch {
	case err != nil:
	case r.Empty():
		err = c.st.DeleteDocument(ctx, recordName(r.Slice))
	default:
		err = c.replaceNote(ctx, recordName(r.Slice), recordDocument{recordFormat, recordVersion, r})
	}
	if err != nil {
		return fmt.Errorf("record of slice %q: %w", r.Slice, err)
	}
	return nil
}

// Records returns the records that there are, by slice. One that cannot be read is
// told, and left out.
func (c *Catalog) Records(ctx context.Context, damaged func(slice string, err error)) (map[string]*Record, error) {
	return notes(ctx, c, recordDir, "slice", damaged, func(doc []byte, slice string) (*Record, error) {
		r, err := parseRecord(doc)
		if err == nil && r.Slice != slice {
			return nil, fmt.Errorf("%w: it is of slice %q", store.ErrDamaged, r.Slice)
		}
		return r, err
	})
}
