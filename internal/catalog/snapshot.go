package catalog

import (
	"cmp"
	"encoding/base32"
	"errors"
	"fmt"
	"io"
	"iter"
	"time"

	"violin/internal/store"
)

// A Snapshot is one sealed cut of a slice: everything that a restore needs and
// what a user wants to know of it. It is plain data and is never changed once
// sealed.
type Snapshot struct {
	// ID is short, sorts by age, and is unique; see NewID.
	ID    string `json:"id"`
	Slice string `json:"slice"`
	// Tag is the name that it was sealed with, if any.
	Tag string `json:"tag,omitempty"`
	// Tags are the names that it has now, in order; unique in the slice. They are no
	// part of the document: a catalog that returns the snapshot fills them in.
	Tags []string `json:"-"`
	// Parent is the ID of the snapshot that the slice was last restored from
	// or that was taken before this one; empty for the first.
	Parent string `json:"parent,omitempty"`
	// ParentSlice is the parent's slice, if that is another: the first snapshot of a
	// fork has it.
	ParentSlice string    `json:"parent_slice,omitempty"`
	Created     time.Time `json:"created"` // when it was sealed, by the server's clock
	// Mode is how memory was captured, such as "background" or "precopy".
	Mode string `json:"mode,omitempty"`
	// Clock is what a restore does with the guests' clocks unless told otherwise:
	// "frozen", "catch-up", or nothing for the default.
	Clock string `json:"clock,omitempty"`
	// Checkpoint tells that a protection took it: it goes when others have come.
	Checkpoint bool `json:"checkpoint,omitempty"`
	// Epoch is the one that the cut began in (all nodes ended in the next).
	Epoch uint8 `json:"epoch"`
	// Topology is the slice's topology: the YAML source, byte for byte.
	Topology []byte  `json:"topology"`
	Nodes    []Node  `json:"nodes"`
	Channel  Channel `json:"channel"`
	Totals   Totals  `json:"totals"`
	// Certificate is the evidence of the cut; nil for a snapshot that was taken
	// before there were certificates.
	Certificate *Certificate `json:"certificate,omitempty"`
}

// What becomes of a guest's clock when it is restored.
const (
	Frozen  = "frozen"   // it goes on from the cut
	CatchUp = "catch-up" // its wall clock is stepped to now
)

// A Node is what a snapshot holds of one VM.
type Node struct {
	Name string `json:"name"`
	Host string `json:"host"` // where it ran
	// CutAt is the instant of its cut, by its host's clock.
	CutAt time.Time `json:"cut_at"`
	// Pause is how long its vCPUs stood still, in nanoseconds.
	Pause time.Duration `json:"pause_ns"`

	// Device is the hypervisor's state without the content of memory pages:
	// for QEMU, the skeleton of the migration stream.
	Device store.BlobRef `json:"device"`
	// Memory is the page table.
	Memory store.BlobRef `json:"memory"`
	// Disks are the page tables of its disks, by name.
	Disks []Disk `json:"disks,omitempty"`
	// Boot are the files that it booted from. They are not in the store: a
	// restore needs files with the same content.
	Boot []BootFile `json:"boot,omitempty"`
	// Generation is the VM generation id that it ran with, a UUID; empty if the VM has
	// no such device, and then none can be loaded with it.
	Generation string `json:"generation,omitempty"`

	RawBytes    int64 `json:"raw_bytes"`    // length of the stream as the hypervisor sent it
	StoredBytes int64 `json:"stored_bytes"` // what the store grew by for it
	Pages       int64 `json:"pages"`        // not zero
	ZeroPages   int64 `json:"zero_pages"`
	Held        int64 `json:"held"`     // frames to it that were held until it had cut
	Recorded    int64 `json:"recorded"` // frames to it in the channel state
}

// A Disk is what a snapshot holds of one disk.
type Disk struct {
	Name   string        `json:"name"`
	Size   int64         `json:"size"`   // bytes
	Blocks store.BlobRef `json:"blocks"` // its page table; see [store.DiskWriter]
	// StoredBytes is what the store grew by for it, which the node's has in it; 0 in
	// snapshots of before this was told.
	StoredBytes int64 `json:"stored_bytes,omitempty"`
	// Use is whose the disk is: nothing for the node's own, or Seed or Share.
	Use string `json:"use,omitempty"`
}

// The disks that a node is given to read.
const (
	Seed  = "seed"  // what cloud-init in the guest reads
	Share = "share" // the content of a directory
)

// A BootFile is a file that a node booted from.
type BootFile struct {
	Kind string     `json:"kind"` // "kernel", "initrd", "rootfs" or "base of disk NAME"
	Size int64      `json:"size"` // bytes
	Hash store.Hash `json:"hash"` // BLAKE3-256 of its content
}

// Channel is the channel state: the frames in flight at the cut.
type Channel struct {
	Ref    store.BlobRef `json:"ref"` // pcapng; zero if there were none
	Frames int64         `json:"frames"`
	Bytes  int64         `json:"bytes"`
}

// Certificate is where the evidence of the cut is.
type Certificate struct {
	Ref         store.BlobRef `json:"ref"`
	Fingerprint store.Hash    `json:"fingerprint"` // of its bytes, whatever their number
}

// Totals is the cut in figures.
type Totals struct {
	Skew     time.Duration `json:"skew_ns"`     // from the first node's cut to the last's
	Duration time.Duration `json:"duration_ns"` // from the request to the seal
	Held     int64         `json:"held"`        // frames, all nodes
	Recorded int64         `json:"recorded"`    // frames in the channel state
	Dropped  int64         `json:"dropped"`     // frames that the cut dropped
	Lost     int64         `json:"lost"`        // frames that the network lost meanwhile

	RawBytes    int64 `json:"raw_bytes"`
	StoredBytes int64 `json:"stored_bytes"`
}

// Node returns the node of that name, or nil.
func (s *Snapshot) Node(name string) *Node {
	for i := range s.Nodes {
		if s.Nodes[i].Name == name {
			return &s.Nodes[i]
		}
	}
	return nil
}

// Disk returns the disk of that name, or nil.
func (n *Node) Disk(name string) *Disk {
	for i := range n.Disks {
		if n.Disks[i].Name == name {
			return &n.Disks[i]
		}
	}
	return nil
}

// Ref is how a user names the snapshot.
func (s *Snapshot) Ref() string { return s.Slice + "@" + s.ID }

// ParentOf is the slice of the snapshot's parent.
func (s *Snapshot) ParentOf() string { return cmp.Or(s.ParentSlice, s.Slice) }

// Roots are what the snapshot needs in the store.
func (s *Snapshot) Roots() iter.Seq2[store.Root, error] {
	return func(yield func(store.Root, error) bool) {
		add := func(what string, ref store.BlobRef, memory bool) bool {
			return ref.IsZero() || yield(store.Root{Name: s.Ref() + what, Ref: ref, Memory: memory}, nil)
		}
		for _, n := range s.Nodes {
			if !add(" "+n.Name+" device state", n.Device, false) || !add(" "+n.Name+" memory", n.Memory, true) {
				return
			}
			for _, d := range n.Disks {
				if !add(" "+n.Name+" disk "+d.Name, d.Blocks, true) {
					return
				}
			}
		}
		if !add(" channel state", s.Channel.Ref, false) {
			return
		}
		if s.Certificate != nil {
			add(" certificate", s.Certificate.Ref, false)
		}
	}
}

// check refuses what must not be sealed.
func (s *Snapshot) check() error {
	errs := []error{CheckName(s.Slice), checkID(s.ID)}
	if s.Tag != "" {
		errs = append(errs, CheckTag(s.Tag))
	}
	if s.Parent != "" {
		errs = append(errs, checkID(s.Parent))
	}
	if s.ParentSlice != "" {
		errs = append(errs, CheckName(s.ParentSlice))
	}
	if s.Clock != "" && s.Clock != Frozen && s.Clock != CatchUp {
		errs = append(errs, fmt.Errorf("clock %q is neither %s nor %s", s.Clock, Frozen, CatchUp))
	}
	if s.Created.IsZero() {
		errs = append(errs, errors.New("no time of creation"))
	}
	seen := make(map[string]bool)
	for _, n := range s.Nodes {
		if n.Name == "" || seen[n.Name] {
			errs = append(errs, fmt.Errorf("node name %q is empty or occurs twice", n.Name))
		}
		seen[n.Name] = true
		if n.Device.IsZero() || n.Memory.IsZero() {
			errs = append(errs, fmt.Errorf("node %q has no device state or no memory", n.Name))
		}
		for i, d := range n.Disks {
			if d.Name == "" || d.Size <= 0 || d.Blocks.IsZero() || n.Disk(d.Name) != &n.Disks[i] {
				errs = append(errs, fmt.Errorf("node %q: disk name %q is empty or occurs twice, or the disk has no content", n.Name, d.Name))
			}
		}
	}
	return errors.Join(errs...)
}

// NewID makes the ID of a snapshot taken at a time: the time in UTC, to the
// second, and 20 random bits, such as "260807-101530-k3f9". rand is
// crypto/rand's Reader, or a seeded one in tests.
func NewID(at time.Time, rand io.Reader) (string, error) {
	var b [3]byte
	if _, err := io.ReadFull(rand, b[:]); err != nil {
		return "", fmt.Errorf("make snapshot ID: %w", err)
	}
	return at.UTC().Format(idTime) + "-" + crockford.EncodeToString(b[:])[:4], nil
}

const idTime = "060102-150405"

// crockford's alphabet has no letters that look like digits.
var crockford = base32.NewEncoding("0123456789abcdefghjkmnpqrstvwxyz").WithPadding(base32.NoPadding)

// checkID accepts what NewID makes and, for the sake of imports and tests, any
// word of its alphabet.
func checkID(id string) error {
	if err := word(id); err != nil {
		return fmt.Errorf("snapshot ID %q: %w", id, err)
	}
	return nil
}

// CheckName reports whether a slice may have a name.
func CheckName(slice string) error {
	if err := word(slice); err != nil {
		return fmt.Errorf("slice name %q: %w", slice, err)
	}
	return nil
}

// CheckTag reports whether a snapshot may have a tag.
func CheckTag(tag string) error {
	if tag == latest {
		return fmt.Errorf("tag %q always means the youngest snapshot; choose another", tag)
	}
	if err := word(tag); err != nil {
		return fmt.Errorf("tag %q: %w", tag, err)
	}
	return nil
}

// word is what names are made of: they become names of files.
func word(s string) error {
	ok := len(s) > 0 && len(s) <= 63
	for i, r := range s {
		letter := r >= 'a' && r <= 'z' || r >= '0' && r <= '9'
		ok = ok && (letter || i > 0 && (r == '-' || r == '.' || r == '_'))
	}
	if !ok {
		return errors.New("want 1 to 63 of a-z, 0-9, and after the first also - . _")
	}
	return nil
}
