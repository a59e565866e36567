package store

import (
	"context"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
)

// FormatVersion is the version of the store's layout that this package
// writes, and the newest that it reads.
const FormatVersion = 1

const (
	describeName = "store.json"
	formatName   = "violin-store"

	// maxDescription bounds store.json, in bytes.
	maxDescription = 64 << 10
)

// Options of a store. The zero value is good for a server.
type Options struct {
	// Logger is told of damaged packs and of packs removed; slog.Default() if nil.
	Logger *slog.Logger
	// ReadOnly opens without the writer's lock. Begin, GC and documents'
	// writes fail. What a writer commits later is not seen.
	ReadOnly bool
	// Key unlocks an encrypted store, or makes a new one encrypted. The zero
	// Key means no encryption.
	Key Key
	// Documents is where documents are kept; nil for the bucket.
	Documents Documents
	// Copied are the directories whose documents, if Documents is not nil, are also
	// copied to the bucket, for the case that Documents is lost; see [Store.Reconcile].
	Copied []string
	// Guard is asked before a pack is deleted, and its error keeps that from being done:
	// by a server that leads no more. Nil for nothing.
	Guard func(context.Context) error
	// PackSize is where a pack of pages is closed, in bytes: 1 MiB to 64 MiB;
	// 0 means 16 MiB. A session holds up to three in memory, one being filled
	// while two are written. Packs of chunks are closed at an eighth of it.
	PackSize int
	// Workers is how many goroutines hash and compress for a session, and
	// decompress for a reader; 0 means one a CPU.
	Workers int

	// StartWorker is called on each worker's goroutine as it starts, for the
	// caller to lower its thread's priority. Nil for nothing.
	StartWorker func()
	// Compression chooses between speed and size; it may change from one
	// opening to the next.
	Compression Compression
	// CacheSize bounds the read cache, in bytes; 0 means 32 MiB.
	CacheSize int64
}

func (o *Options) fill() error {
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.PackSize == 0 {
		o.PackSize = 16 << 20
	}
	if o.PackSize < 1<<20 || o.PackSize > 64<<20 {
		return fmt.Errorf("pack size of %d bytes; choose 1 MiB to 64 MiB", o.PackSize)
	}
	if o.Workers == 0 {
		o.Workers = runtime.NumCPU()
	}
	if o.Workers < 0 {
		return fmt.Errorf("%d workers; choose 1 or more, or 0 for one a CPU", o.Workers)
	}
	if o.CacheSize == 0 {
		o.CacheSize = 32 << 20
	}
	return nil
}

// A Store is an open store. It is safe for concurrent use.
type Store struct {
	opts   Options
	log    *slog.Logger
	bucket *bucket
	id     string
	key    masterKey
	codec  *codec
	cache  *windowCache
	rooms  sync.Pool // of *[]byte: buffers of former sessions' packs of pages

	documents Documents
	copies    *copies // nil without Options.Documents

	pages index

	// mu guards what follows, and makes "look up and pin" atomic against the
	// collector's "not pinned, so condemn".
	mu       sync.RWMutex
	packs    []*pack             // by number; 0 is unused
	chunks   map[Hash]chunkPlace // committed chunks
	unread   []*Error            // packs whose footer could not be read
	sessions map[*Session]struct{}
	gc       *collection // the running collection, if any
	closed   bool
}

// A pack as the store remembers it.
type pack struct {
	no      uint32
	id      packID
	kind    kind
	method  method
	size    int64 // bytes of the object; 0 until written
	entries int
	state   packState
	seal    cipher.AEAD // nil: not encrypted

	// reliedOn is set once a session found a page in it instead of storing it.
	reliedOn atomic.Bool
}

type packState int

const (
	packOpen      packState = iota // of a session that has not committed
	packCommitted                  // its entries are in the index
	packDeleted                    // or about to be: none of its entries is in the index
)

type chunkPlace struct {
	pack, offset, stored, plain uint32
}

// description is the document that makes a bucket a store.
type description struct {
	Format  string   `json:"format"`
	Version int      `json:"version"`
	ID      string   `json:"id"` // 32 hexadecimal digits, random
	Key     *keyWrap `json:"key,omitempty"`
}

// Open opens the store in a directory (a path or file:// URL) or in a bucket
// by any URL whose gocloud.dev/blob driver the program has linked in, and
// creates it on first use. It reads the footer of every pack.
//
// Errors: ErrLocked if another process has it open for writing (directories
// only), ErrKey if it is encrypted and the key is missing or wrong.
func Open(ctx context.Context, at string, opts Options) (*Store, error) {
	b, err := openBucket(ctx, at, !opts.ReadOnly)
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", at, err)
	}
	s, err := open(ctx, b, opts)
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", at, errors.Join(err, b.close()))
	}
	return s, nil
}

func open(ctx context.Context, b *bucket, opts Options) (*Store, error) {
	if err := opts.fill(); err != nil {
		return nil, err
	}
	if !opts.ReadOnly {
		if err := b.acquire(); err != nil {
			return nil, err
		}
		if err := b.sweepTemp(); err != nil {
			return nil, fmt.Errorf("remove half-written files: %w", err)
		}
	}
	s := &Store{
		opts:     opts,
		log:      opts.Logger,
		bucket:   b,
		cache:    newWindowCache(opts.CacheSize),
		packs:    []*pack{nil},
		chunks:   make(map[Hash]chunkPlace),
		sessions: make(map[*Session]struct{}),
	}
	if s.documents = opts.Documents; s.documents == nil {
		s.documents = bucketDocuments{b}
	} else if !opts.ReadOnly {
		s.copies = newCopies(opts.Documents, bucketDocuments{b}, opts.Copied, opts.Logger)
		s.documents = s.copies
	}
	if err := s.describe(ctx); err != nil {
		return nil, err
	}
	if err := s.load(ctx); err != nil {
		return nil, err
	}
	var err error
	if s.codec, err = newCodec(opts.Compression, opts.Workers); err != nil {
		return nil, err
	}
	if s.copies != nil {
		s.copies.start()
	}
	return s, nil
}

// describe reads store.json, or writes it if the bucket is empty.
func (s *Store) describe(ctx context.Context) error {
	raw, err := s.bucket.read(ctx, describeName, maxDescription)
	if errors.Is(err, ErrMissing) {
		return s.create(ctx)
	}
	if err != nil {
		return fmt.Errorf("read %s: %w", describeName, err)
	}
	var d description
	if err := json.Unmarshal(raw, &d); err != nil {
		return fmt.Errorf("read %s: %w: %w", describeName, ErrDamaged, err)
	}
	if d.Format != formatName {
		return fmt.Errorf("read %s: format %q, want %q; this is no violin store", describeName, d.Format, formatName)
	}
	if d.Version < 1 || d.Version > FormatVersion {
		return fmt.Errorf("store has format version %d, this violin reads version %d and older; use a later violin", d.Version, FormatVersion)
	}
	s.id = d.ID
	s.key, err = d.Key.unwrap(s.opts.Key, d.ID)
	return err
}

func (s *Store) create(ctx context.Context) error {
	if s.opts.ReadOnly {
		return fmt.Errorf("%w: no %s; open it for writing once to create it", ErrMissing, describeName)
	}
	for o, err := range s.bucket.list(ctx, "") {
		if err != nil {
			return fmt.Errorf("look for other files: %w", err)
		}
		if o.name != "lock" {
			return fmt.Errorf("it has no %s but other files (%s); choose an empty place", describeName, o.name)
		}
	}
	s.id = randomID().String()
	d := description{Format: formatName, Version: FormatVersion, ID: s.id}
	if !s.opts.Key.IsZero() {
		s.key = make(masterKey, 32)
		_, _ = rand.Read(s.key) // never fails
		d.Key = wrapKey(s.key, s.opts.Key, s.id)
	}
	raw, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return err
	}
	if err := s.bucket.putNew(ctx, describeName, append(raw, '\n')); err != nil {
		return fmt.Errorf("write %s: %w", describeName, err)
	}
	return nil
}

func randomID() packID {
	var id packID
	_, _ = rand.Read(id[:]) // never fails
	return id
}

// load reads every pack's footer into the index. Packs that a killed session
// left behind are whole and true, so they count; the collector removes what no
// snapshot refers to.
func (s *Store) load(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for o, err := range s.bucket.list(ctx, packPrefix) {
		if err != nil {
			_ = g.Wait()
			return fmt.Errorf("list packs: %w", err)
		}
		g.Go(func() error {
			err := s.loadPack(ctx, o)
			var damage *Error
			if errors.As(err, &damage) && errors.Is(err, ErrDamaged) {
				// The rest of the store is as good as before.
				s.log.Error("store: pack cannot be used; check the store", "pack", o.name, "err", err)
				s.mu.Lock()
				s.unread = append(s.unread, damage)
				s.mu.Unlock()
				return nil
			}
			return err
		})
	}
	return g.Wait()
}

func (s *Store) loadPack(ctx context.Context, o object) error {
	h, entries, err := s.readFooter(ctx, o)
	if errors.Is(err, ErrMissing) {
		return nil // a writer's collector deleted it after it was listed
	}
	if err != nil {
		return err
	}
	p, err := s.addPack(h.id, h.kind, h.method)
	if err != nil {
		return err
	}
	s.commitPack(p, o.size, entries)
	return nil
}

// readFooter reads what a pack says of itself.
func (s *Store) readFooter(ctx context.Context, o object) (header, []entry, error) {
	fail := func(err error) (header, []entry, error) {
		return header{}, nil, &Error{Op: "read footer", Pack: o.name, Offset: -1, Err: err}
	}
	id, ok := parsePackName(o.name)
	if !ok {
		return fail(fmt.Errorf("%w: not a pack's name", ErrDamaged))
	}
	if o.size < headerSize+trailerSize || o.size > maxPackSize {
		return fail(fmt.Errorf("%w: %d bytes are no pack", ErrDamaged, o.size))
	}
	head, err := s.bucket.readAt(ctx, o.name, 0, headerSize)
	if err != nil {
		return fail(err)
	}
	h, err := parseHeader(head)
	if err != nil {
		return fail(err)
	}
	if h.id != id {
		return fail(fmt.Errorf("%w: header names pack %s", ErrDamaged, h.id))
	}
	// One guess mostly reads all of a footer; a second request the rest.
	const guess = 64 << 10
	tail, err := s.tail(ctx, o, guess)
	if err != nil {
		return fail(err)
	}
	_, length, err := footerLen(tail, o.size)
	if err != nil {
		return fail(err)
	}
	if length > len(tail) {
		if tail, err = s.tail(ctx, o, int64(length)); err != nil {
			return fail(err)
		}
	}
	entries, err := parseFooter(tail, o.size, h, s.key.pack(id))
	if err != nil {
		return fail(err)
	}
	return h, entries, nil
}

func (s *Store) tail(ctx context.Context, o object, n int64) ([]byte, error) {
	n = min(n, o.size)
	b, err := s.bucket.readAt(ctx, o.name, o.size-n, n)
	if err == nil && int64(len(b)) != n {
		err = fmt.Errorf("%w: it shrank while it was read", ErrDamaged)
	}
	return b, err
}

// addPack gives a pack a number.
func (s *Store) addPack(id packID, k kind, m method) (*pack, error) {
	p := &pack{id: id, kind: k, method: m, seal: s.key.pack(id)}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.packs) > maxPacks {
		return nil, fmt.Errorf("store has %d packs, which is all that the index can number", maxPacks)
	}
	p.no = uint32(len(s.packs))
	s.packs = append(s.packs, p)
	return p, nil
}

// commitPack makes a written pack's entries visible.
func (s *Store) commitPack(p *pack, size int64, entries []entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p.size, p.entries, p.state = size, len(entries), packCommitted
	for _, e := range entries {
		// Of two copies (two sessions stored the same page at a time) the
		// first stays; the collector drops the other.
		if p.kind == kindPages {
			s.pages.add(e.hash, makeLocation(p.no, e.offset, e.stored))
		} else if _, ok := s.chunks[e.hash]; !ok {
			s.chunks[e.hash] = chunkPlace{p.no, e.offset, e.stored, e.plain}
		}
	}
}

// removePack deletes a pack's object, unless the guard objects.
func (s *Store) removePack(ctx context.Context, p *pack) error {
	if s.opts.Guard != nil {
		if err := s.opts.Guard(ctx); err != nil {
			return err
		}
	}
	return s.bucket.remove(ctx, p.id.name())
}

// packOf returns a pack by its number.
func (s *Store) packOf(no uint32) *pack {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.packs[no]
}

// ID returns the store's identifier: 32 hexadecimal digits made when it was
// created.
func (s *Store) ID() string { return s.id }

// Encrypted reports whether the store is encrypted at rest.
func (s *Store) Encrypted() bool { return s.key != nil }

// Has reports whether a page is committed.
func (s *Store) Has(h Hash) bool {
	if h == zeroPage {
		return true
	}
	_, ok := s.pages.get(h)
	return ok
}

// Close releases the store. Sessions that are still open are not aborted:
// their packs stay until a collection.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	open := len(s.sessions)
	s.mu.Unlock()
	if open > 0 {
		s.log.Warn("store: closed with sessions open", "sessions", open)
	}
	s.codec.close()
	if s.copies != nil {
		s.copies.stop()
	}
	return s.bucket.close()
}

// Stats describes what a store holds.
type Stats struct {
	Packs       int   // packs of committed pages and chunks
	PackBytes   int64 // their objects' sizes, in bytes
	Pages       int64 // distinct pages
	PageBytes   int64 // what they were before compression, in bytes
	Chunks      int64 // distinct chunks of blobs and page tables
	IndexBytes  int64 // memory that the page index takes, in bytes
	UnreadPacks int   // packs that are damaged beyond use
}

// Stats returns what the store holds now.
func (s *Store) Stats() Stats {
	s.mu.RLock()
	defer s.mu.RUnlock()
	st := Stats{Chunks: int64(len(s.chunks)), UnreadPacks: len(s.unread)}
	for _, p := range s.packs[1:] {
		if p.state == packCommitted {
			st.Packs++
			st.PackBytes += p.size
		}
	}
	st.Pages, st.IndexBytes = s.pages.size()
	st.PageBytes = st.Pages * PageSize
	return st
}
