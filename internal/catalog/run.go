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
	runDir     = "runs"
	runFormat  = "violin-run"
	runVersion = 1

	termDir     = "terms"
	termName    = termDir + "/term.json"
	termFormat  = "violin-term"
	termVersion = 1
)

// A Run is what is noted of a slice that runs on hosts that have joined, for the server
// that comes after this one: it is written before what it speaks of is begun, and
// deleted before that is ended. What no note speaks of, hosts end.
type Run struct {
	Slice    string    `json:"slice"`
	Term     uint64    `json:"term"` // of the server that wrote it
	Topology string    `json:"topology"`
	Created  time.Time `json:"created"`
	// First is the number of its first network; the others follow in the topology's order.
	First      uint16                `json:"first"`
	Hosts      map[string]RunHost    `json:"hosts"`                // by name
	Boot       map[string][]BootFile `json:"boot,omitempty"`       // by node, as in a [Node]
	Generation map[string]string     `json:"generation,omitempty"` // ditto
	Disks      map[string][]Disk     `json:"disks,omitempty"`      // ditto, without what a snapshot tells of them

	// Whole is set once all of it is up. What is half made is ended, not gone on with.
	Whole bool `json:"whole,omitempty"`
	// Epoch is that of all nodes; while a cut runs, the one that it begins in.
	Epoch  uint8  `json:"epoch"`
	Head   string `json:"head,omitempty"`   // the snapshot's id that it descends from
	Origin string `json:"origin,omitempty"` // the slice of Head, if it is another
	// Waiting is set while it is paused at a snapshot.
	Waiting *Waiting `json:"waiting,omitempty"`
	// Halted: its nodes stand still since the cut before, to be suspended.
	Halted bool `json:"halted,omitempty"`
	// Lost are hosts that are of it no more: no snapshot without their nodes is whole.
	Lost []string `json:"lost,omitempty"`
	// Cut is set while one is under way.
	Cut *RunCut `json:"cut,omitempty"`
}

// A RunHost is what one host runs of a slice.
type RunHost struct {
	Run  string `json:"run"`  // its name there
	Peer uint16 `json:"peer"` // the host's number among the hosts
}

// Waiting is how a slice that is paused is to go on.
type Waiting struct {
	Snapshot string `json:"snapshot"` // SLICE@ID, with the channel state
	Clock    string `json:"clock"`    // [Frozen] or [CatchUp]
	// Begun: some of its nodes may run already.
	Begun bool `json:"begun,omitempty"`
}

// A RunCut is a cut that is under way. It has been committed if there is a snapshot of
// its name, and is to be aborted otherwise.
type RunCut struct {
	ID string `json:"id"` // and the snapshot's
	To uint8  `json:"to"` // the epoch that it leads to
	// Ordered: hosts may have been ordered to cut their nodes, so that an abort leads
	// to the epoch To as well, and not back.
	Ordered bool      `json:"ordered,omitempty"`
	Halt    bool      `json:"halt,omitempty"` // the nodes are to stand still once it is committed
	Began   time.Time `json:"began"`
}

// check tells what a note cannot say.
func (r *Run) check() error {
	if err := CheckName(r.Slice); err != nil {
		return err
	}
	switch {
	case len(r.Hosts) == 0:
		return errors.New("it runs on no host")
	case r.First == 0:
		return errors.New("its networks have no numbers")
	case r.Topology == "":
		return errors.New("it has no topology")
	}
	for name, h := range r.Hosts {
		if h.Run == "" || h.Peer == 0 {
			return fmt.Errorf("host %q has no run or no number", name)
		}
	}
	if r.Head != "" {
		if err := checkID(r.Head); err != nil {
			return err
		}
	}
	if r.Cut != nil {
		return checkID(r.Cut.ID)
	}
	return nil
}

type runDocument struct {
	Format  string `json:"format"`
	Version int    `json:"version"`
	Run     *Run   `json:"run"`
}

func runName(slice string) string { return runDir + "/" + slice + ".json" }

func parseRun(doc []byte) (*Run, error) {
	var d runDocument
	if err := parseNote(doc, "note of what runs", runFormat, runVersion, &d); err != nil {
		return nil, err
	}
	if d.Run == nil {
		return nil, fmt.Errorf("%w: there is no note in it", store.ErrDamaged)
	}
	if err := d.Run.check(); err != nil {
		return nil, fmt.Errorf("%w: %w", store.ErrDamaged, err)
	}
	return d.Run, nil
}

// PutRun notes what runs of a slice in the place of what was noted, by one atomic write.
func (c *Catalog) PutRun(ctx context.Context, r *Run) error {
	err := r.check()
	if err == nil {
		err = c.replaceNote(ctx, runName(r.Slice), runDocument{runFormat, runVersion, r})
	}
	if err != nil {
		return fmt.Errorf("note what runs of slice %q: %w", r.Slice, err)
	}
	return nil
}

// DeleteRun notes that nothing of a slice is to run any more.
func (c *Catalog) DeleteRun(ctx context.Context, slice string) error {
	if err := c.st.DeleteDocument(ctx, runName(slice)); err != nil {
		return fmt.Errorf("note that slice %q runs no more: %w", slice, err)
	}
	return nil
}

// Runs returns the notes of what runs, by slice. One that cannot be read is an error:
// what it speaks of would be ended as unknown.
func (c *Catalog) Runs(ctx context.Context) (map[string]*Run, error) {
	out := map[string]*Run{}
	for name, err := range c.st.Documents(ctx, runDir) {
		if err != nil {
			return nil, fmt.Errorf("list what runs: %w", err)
		}
		doc, err := c.st.GetDocument(ctx, name)
		var r *Run
		if err == nil {
			r, err = parseRun(doc)
		}
		if err == nil && runName(r.Slice) != name {
			err = fmt.Errorf("%w: it is of slice %q", store.ErrDamaged, r.Slice)
		}
		if err != nil {
			slice := strings.TrimSuffix(strings.TrimPrefix(name, runDir+"/"), ".json")
			return nil, fmt.Errorf("read what runs of slice %q: %w; a violin that can read it goes on with the slice, and with its document %s deleted its hosts end it", slice, err, name)
		}
		out[r.Slice] = r
	}
	return out, nil
}

type termDocument struct {
	Format  string `json:"format"`
	Version int    `json:"version"`
	Term    uint64 `json:"term"`
	// Etcd are the endpoints of the etcd that the server had; none for one of its own.
	Etcd []string `json:"etcd,omitempty"`
}

// CopiedTerm is the term of the last server that led, and the endpoints of its etcd, if
// that was not its own: as the document's copy beside the store's pages says, which
// outlives its original. The term is 0 if there was none.
func (c *Catalog) CopiedTerm(ctx context.Context) (term uint64, etcd []string, err error) {
	d := termDocument{}
	doc, err := c.st.Copy(ctx, termName)
	if errors.Is(err, store.ErrMissing) {
		return 0, nil, nil
	}
	if err == nil {
		err = parseNote(doc, "the last server's term", termFormat, termVersion, &d)
	}
	if err != nil {
		return 0, nil, fmt.Errorf("term of the last server: %w", err)
	}
	return d.Term, d.Etcd, nil
}

// PutTerm notes the term of a server that leads, and the endpoints of its etcd.
func (c *Catalog) PutTerm(ctx context.Context, term uint64, etcd []string) error {
	if err := c.replaceNote(ctx, termName, termDocument{termFormat, termVersion, term, etcd}); err != nil {
		return fmt.Errorf("note this server's term: %w", err)
	}
	return nil
}
