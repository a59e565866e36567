package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"

	"gocloud.dev/blob"
	"gocloud.dev/blob/fileblob"
	"gocloud.dev/gcerrors"
	"golang.org/x/sys/unix"
)

// A bucket is what the store needs of gocloud.dev/blob, plus what a plain
// directory can do better: writes that survive a power cut, and a lock that
// dies with its process.
type bucket struct {
	*blob.Bucket
	dir  string   // the directory, if it is one
	lock *os.File // held while the store is open for writing
	// making is held, in a directory, from looking whether a name is taken until it is.
	making sync.Mutex
}

// tempPrefix begins the names of files that are being written. No object of
// the store is called so.
const tempPrefix = ".tmp-"

// openBucket opens a directory (a path or a file:// URL), or any URL whose
// scheme the program has linked in. It makes the directory if create is set.
func openBucket(ctx context.Context, at string, create bool) (*bucket, error) {
	dir := at
	if strings.Contains(at, "://") {
		u, err := url.Parse(at)
		if err != nil {
			return nil, err
		}
		if u.Scheme != "file" {
			b, err := blob.OpenBucket(ctx, at)
			if err != nil {
				return nil, err
			}
			return &bucket{Bucket: b}, nil
		}
		dir = filepath.FromSlash(u.Path)
	}
	if dir == "" {
		return nil, errors.New("no directory given; name one, or a URL such as file:///var/lib/violin/store")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if create {
		// Memory holds keys: nobody but the owner reads the store.
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	b, err := fileblob.OpenBucket(dir, &fileblob.Options{NoTempDir: true, Metadata: fileblob.MetadataDontWrite, DirFileMode: 0o700})
	if err != nil {
		return nil, err
	}
	return &bucket{Bucket: b, dir: dir}, nil
}

// acquire takes the writer's lock of a directory. Other buckets have none:
// there, whoever runs the writers (the elected server) has to see to it.
func (b *bucket) acquire() error {
	if b.dir == "" {
		return nil
	}
	name := filepath.Join(b.dir, "lock")
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("%w; stop the violin server that uses it, or open it read-only", ErrLocked)
		}
		return fmt.Errorf("lock %s: %w", name, err)
	}
	b.lock = f
	return nil
}

// close releases the lock and the bucket.
func (b *bucket) close() error {
	var err error
	if b.lock != nil {
		err = b.lock.Close()
	}
	return errors.Join(b.Close(), err)
}

// put writes an object whole or not at all. In a directory it is on the disk,
// name included, when put returns. There, data in a [directRoom] goes past the page cache.
func (b *bucket) put(ctx context.Context, name string, data []byte) error {
	if b.dir == "" {
		return b.WriteAll(ctx, name, data, nil)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	file := filepath.Join(b.dir, filepath.FromSlash(name))
	parent := filepath.Dir(file)
	if err := b.mkdir(parent); err != nil {
		return err
	}
	return writeFile(parent, file, data)
}

// mkdir makes a directory below the bucket's and syncs the parents of what it
// made, so that the new names are on the disk, too.
func (b *bucket) mkdir(dir string) error {
	if _, err := os.Stat(dir); err == nil || dir == b.dir {
		return err
	}
	parent := filepath.Dir(dir)
	if err := b.mkdir(parent); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return syncDir(parent)
}

func writeFile(parent, file string, data []byte) (err error) {
	f, err := os.CreateTemp(parent, tempPrefix)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = os.Remove(f.Name())
		}
	}()
	if err := writeWhole(f, data); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), file); err != nil {
		return err
	}
	return syncDir(parent)
}

func syncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	err = d.Sync()
	return errors.Join(err, d.Close())
}

// readAt reads n bytes of an object from an offset on; fewer at its end.
func (b *bucket) readAt(ctx context.Context, name string, offset, n int64) ([]byte, error) {
	r, err := b.NewRangeReader(ctx, name, offset, n, nil)
	if err != nil {
		return nil, missing(err)
	}
	defer r.Close()
	// The reader knows how much there really is, whatever n asks for.
	buf := make([]byte, max(0, min(n, r.Size()-offset)))
	if _, err := io.ReadFull(r, buf); err != nil {
		return nil, err
	}
	return buf, nil
}

// readInto reads an object from an offset on into buf, and returns what it got: less than
// buf's length at the object's end. Of a directory's files it is faster than readAt.
func (b *bucket) readInto(ctx context.Context, name string, offset int64, buf []byte) ([]byte, error) {
	if b.dir == "" {
		r, err := b.NewRangeReader(ctx, name, offset, int64(len(buf)), nil)
		if err != nil {
			return nil, missing(err)
		}
		defer r.Close()
		n, err := io.ReadFull(r, buf)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) && int64(n) == r.Size()-offset {
			err = nil
		}
		return buf[:n], err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	f, err := os.Open(filepath.Join(b.dir, filepath.FromSlash(name)))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", ErrMissing, err)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	n, err := f.ReadAt(buf, offset)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return buf[:n], err
}

// read reads a whole object of at most limit bytes.
func (b *bucket) read(ctx context.Context, name string, limit int64) ([]byte, error) {
	if b.dir != "" {
		return b.readFile(name, limit)
	}
	r, err := b.NewReader(ctx, name, nil)
	if err != nil {
		return nil, missing(err)
	}
	defer r.Close()
	if r.Size() > limit {
		return nil, fmt.Errorf("%w: %d bytes, want at most %d", ErrDamaged, r.Size(), limit)
	}
	buf := make([]byte, r.Size())
	if _, err := io.ReadFull(r, buf); err != nil {
		return nil, err
	}
	return buf, nil
}

// readFile is read in a directory. It opens the file before it asks for its size: the
// library asks for that by the name, which may be another file's by then.
func (b *bucket) readFile(name string, limit int64) ([]byte, error) {
	f, err := os.Open(filepath.Join(b.dir, filepath.FromSlash(name)))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", ErrMissing, err)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	buf, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(buf)) > limit {
		return nil, fmt.Errorf("%w: more than %d bytes", ErrDamaged, limit)
	}
	return buf, nil
}

// remove deletes an object, for good: in a directory, a power cut does not bring
// it back. One that is not there is no error.
func (b *bucket) remove(ctx context.Context, name string) error {
	err := b.Delete(ctx, name)
	if gcerrors.Code(err) == gcerrors.NotFound {
		return nil
	}
	if err == nil && b.dir != "" {
		err = syncDir(filepath.Dir(filepath.Join(b.dir, filepath.FromSlash(name))))
	}
	return err
}

type object struct {
	name string
	size int64
}

// list yields the objects whose names begin with prefix, in order of names,
// without files that are still being written.
func (b *bucket) list(ctx context.Context, prefix string) iter.Seq2[object, error] {
	return func(yield func(object, error) bool) {
		it := b.List(&blob.ListOptions{Prefix: prefix})
		for {
			o, err := it.Next(ctx)
			if errors.Is(err, io.EOF) {
				return
			}
			if err != nil {
				yield(object{}, err)
				return
			}
			if strings.HasPrefix(path.Base(o.Key), tempPrefix) {
				continue
			}
			if !yield(object{name: o.Key, size: o.Size}, nil) {
				return
			}
		}
	}
}

// sweepTemp removes what a killed writer left half-written. The writer's lock
// must be held.
func (b *bucket) sweepTemp() error {
	if b.dir == "" {
		return nil
	}
	return filepath.WalkDir(b.dir, func(name string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if !d.IsDir() && strings.HasPrefix(d.Name(), tempPrefix) {
			return os.Remove(name)
		}
		return nil
	})
}

// missing turns the bucket's not-found error into the store's.
func missing(err error) error {
	if gcerrors.Code(err) == gcerrors.NotFound {
		return fmt.Errorf("%w: %w", ErrMissing, err)
	}
	return err
}

// putNew is put for a name that must not be taken: ErrExists if it is. In a
// directory, the writer's lock makes it one step; elsewhere the bucket does, so
// that of two writers only one wins.
func (b *bucket) putNew(ctx context.Context, name string, data []byte) error {
	if b.dir == "" {
		err := b.WriteAll(ctx, name, data, &blob.WriterOptions{IfNotExist: true})
		if gcerrors.Code(err) != gcerrors.FailedPrecondition {
			return err
		}
		// A write whose answer was lost is tried again by the client library, and
		// then finds its own object.
		got, rerr := b.read(ctx, name, int64(len(data)))
		switch {
		case rerr == nil && bytes.Equal(got, data):
			return nil
		case rerr == nil || errors.Is(rerr, ErrDamaged):
			return fmt.Errorf("%w: %w", ErrExists, err)
		}
		return fmt.Errorf("%w: %w: read it back: %w", ErrUncertain, err, rerr)
	}
	b.making.Lock()
	defer b.making.Unlock()
	exists, err := b.Exists(ctx, name)
	if err != nil {
		return err
	}
	if exists {
		return ErrExists
	}
	return b.put(ctx, name, data)
}
