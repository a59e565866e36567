package remote

import (
	"bytes"
	"errors"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"violin/internal/agent"
	"violin/internal/cut"
	"violin/internal/hypervisor/qemu"
	"violin/internal/store"
)

// diskOf is what a disk holds, by page; an empty page is one of zeros.
type diskOf map[uint64]string

func (d diskOf) take(offset uint64, data []byte) error {
	d[offset/store.PageSize] = string(data)
	return nil
}

// page is one of a content of its own.
func page(n int) []byte { return bytes.Repeat([]byte{byte(n), byte(n >> 8), 1, 3}, store.PageSize/4) }

// What a host ships of a disk is the disk in the store: from nothing, on from an earlier
// table, and from nothing again if that is gone. A later page replaces an earlier one.
func TestDiskShipped(t *testing.T) {
	w := newWorld(t)
	const size = 3*diskBatch*store.PageSize + 512
	var written diskOf
	ship := func(cutID string, base store.BlobRef, write func(put func(n uint64, data []byte))) (store.BlobRef, error) {
		t.Helper()
		s := w.session(t)
		o := w.prepare(t, cutID, s, func(cut.Event) {})
		d, err := o.Session.NewDiskWriter(t.Context(), size, base)
		if err != nil {
			return store.BlobRef{}, err
		}
		write(func(n uint64, data []byte) {
			if err := d.Page(n*store.PageSize, data); err != nil {
				t.Fatal(err)
			}
			if data != nil && bytes.Equal(data, zeros[:]) {
				data = nil
			}
			written[n] = string(data)
		})
		ref, err := d.Close()
		if err != nil {
			return ref, err
		}
		if st := d.Stats(); st.SentPages == 0 || st.RawBytes < size || st.Pages == 0 {
			t.Errorf("%+v", st)
		}
		return ref, s.Commit(t.Context(), nil)
	}
	holds := func(what string, ref store.BlobRef) {
		t.Helper()
		r, err := w.store.OpenDisk(t.Context(), size, ref)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		got := diskOf{}
		if err := r.Pages(got.take); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, written) {
			t.Errorf("%s: %d pages are the disk's own, and %d were written; or they are others", what, len(got), len(written))
		}
	}
	written = diskOf{}
	first, err := ship("first", store.BlobRef{}, func(put func(uint64, []byte)) {
		for n := range 3 * batchPages {
			put(uint64(n)*7, page(n))
		}
		for n := range uint64(diskBatch + 50) {
			put(3000+n, nil)
		}
		for n := range 2 * batchPages { // again, of layers that lie higher
			put(uint64(n)*7, page(n+10000))
		}
		put(3*diskBatch, page(1)) // the last, which is short
		put(70, zeros[:])
	})
	if err != nil {
		t.Fatal(err)
	}
	holds("from nothing", first)
	second, err := ship("second", first, func(put func(uint64, []byte)) {
		put(7, nil)
		put(3001, page(5))
		put(9999, page(6))
	})
	if err != nil {
		t.Fatal(err)
	}
	holds("on from the first", second)

	gone := store.BlobRef{Hash: store.Sum([]byte("gone")), Size: first.Size}
	if _, err := ship("third", gone, nil); !errors.Is(err, store.ErrMissing) {
		t.Errorf("on from what is gone: %v", err)
	}
	if _, err := ship("fourth", store.BlobRef{}, func(put func(uint64, []byte)) { put(1, page(1)) }); err != nil {
		t.Error(err)
	}
}

// What a host says of a disk is not believed, either.
func TestDiskRefused(t *testing.T) {
	w := newWorld(t)
	o := w.prepare(t, "c", w.session(t), func(cut.Event) {})
	begin := func() *diskWriter {
		t.Helper()
		d, err := o.Session.NewDiskWriter(t.Context(), 10*store.PageSize, store.BlobRef{})
		if err != nil {
			t.Fatal(err)
		}
		return d.(*diskWriter)
	}
	d := begin()
	for _, offset := range []uint64{10 * store.PageSize, 5} {
		if err := d.Page(offset, nil); err == nil {
			t.Errorf("a page at %d was taken", offset)
		}
	}
	for _, forged := range []*diskPages{
		{pages: []uint64{1}, hashes: []store.Hash{store.Sum([]byte("never sent"))}},
		{pages: []uint64{1 << 60}, hashes: []store.Hash{store.ZeroPage()}},
		{pages: []uint64{1, 2}, hashes: []store.Hash{store.ZeroPage()}},
	} {
		d := begin()
		forged.ready = make(chan struct{})
		close(forged.ready)
		d.queue <- forged
		if ref, err := d.Close(); err == nil || !ref.IsZero() {
			t.Errorf("%v was taken: %v", forged, err)
		}
	}
}

// Disks begin on a host as they are to: of files that it has or was sent, and if they are
// restored, with what the store has.
func TestDisksOfNodes(t *testing.T) {
	w := newWorld(t)
	base := filepath.Join(t.TempDir(), "base")
	write(t, base, "base")
	content := diskOf{0: string(page(1)), 5: ""}
	for n := range uint64(2 * batchPages) {
		content[100+n] = string(page(int(n)))
	}
	restore := func(page func(uint64, []byte) error) error {
		for n := range uint64(1000) {
			data, ok := content[n]
			if !ok {
				continue
			}
			b := []byte(data)
			if data == "" {
				b = nil
			}
			if err := page(n*store.PageSize, b); err != nil {
				return err
			}
		}
		return nil
	}
	table := store.BlobRef{Hash: store.Sum([]byte("table")), Size: 77}
	spec := agent.NodeSpec{
		Slice: "s", Name: "n", Boot: map[string]store.Hash{agent.BaseOf("root"): store.Sum([]byte("base"))}, Disks: map[string]store.BlobRef{"data": table},
		Machine: qemu.Spec{Firmware: "uefi", Disks: []qemu.Disk{
			{Name: "root", Size: 1 << 20, Base: base, BaseFormat: "raw", Boot: 1},
			{Name: "data", Size: 8 << 20, Restore: restore, ReadOnly: true},
		}},
	}
	if err := w.agent.AddNode(t.Context(), spec, true); err != nil {
		t.Fatal(err)
	}
	got := w.host.spec
	if got.Machine.Firmware != "uefi" || !reflect.DeepEqual(got.Disks, spec.Disks) || len(got.Machine.Disks) != 2 || !reflect.DeepEqual(got.Machine.Disks[0], spec.Machine.Disks[0]) || !got.Machine.Disks[1].ReadOnly {
		t.Errorf("%+v", got)
	}
	if !reflect.DeepEqual(w.host.restored["data"], content) {
		t.Errorf("%d pages came, want %d", len(w.host.restored["data"]), len(content))
	}

	// One that can't be read says why; and afterwards there is nothing to be read any more.
	spec.Machine.Disks[1].Restore = func(func(uint64, []byte) error) error { return errors.New("pack p is damaged") }
	if err := w.agent.AddNode(t.Context(), spec, true); err == nil || !strings.Contains(err.Error(), "pack p is damaged") {
		t.Error(err)
	}
	if err := got.Machine.Disks[1].Restore(diskOf{}.take); err == nil {
		t.Error("a disk can be read when its node is there")
	}

	// Results have what became of them.
	want := agent.NodeResult{Node: "n", Disks: []agent.Disk{{Name: "data", Size: 8 << 20, Blocks: table, Stats: store.MemoryStats{Pages: 1, ZeroPages: 2, RawBytes: 3, SentPages: 4, NewPages: 5, StoredBytes: 6}}}}
	w.host.results = agent.HostResult{Nodes: []agent.NodeResult{want}}
	if r, err := w.agent.Results("s", "c"); err != nil || len(r.Nodes) != 1 || !reflect.DeepEqual(r.Nodes[0].Disks, want.Disks) {
		t.Errorf("%+v, %v", r, err)
	}
}
