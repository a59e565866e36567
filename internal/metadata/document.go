package metadata

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"violin/internal/store"
)

const (
	// FormatVersion is the version of what this package writes, and the newest that it
	// reads.
	FormatVersion = 1

	formatName = "violin-metadata"

	formatKey   = "format"
	documentDir = "documents/"
	partDir     = "parts/"

	// whole and divided are the first bytes of a document's value.
	whole, divided = 0, 1
	// partSize is how many bytes of a document are written at once. etcd's own limit of
	// a request is 1.5 MiB, unless its operators chose another.
	partSize = 1 << 20
	// page is how many names are asked for at once.
	page = 1000
)

type format struct {
	Format  string `json:"format"`
	Version int    `json:"version"`
	// Origin is when it was made, in milliseconds since 1970, or later. Terms are counted
	// from it: revisions begin anew with a new etcd.
	Origin int64 `json:"origin"`
}

// parts is where the bytes of a document are that has parts.
type parts struct {
	ID    string            `json:"id"`
	Count int               `json:"count"`
	Size  int               `json:"size"`
	Sum   [sha256.Size]byte `json:"sum"` // SHA-256 of all
}

var _ store.Documents = (*Leadership)(nil)

// readFormat reads what is written down of a store's metadata; nil if nothing is.
func (c *Client) readFormat(ctx context.Context, storeID string) (*format, error) {
	key := c.key(storeID + "/" + formatKey)
	r, err := c.get(ctx, key)
	if err != nil || len(r.Kvs) == 0 {
		return nil, err
	}
	var f format
	switch err := json.Unmarshal(r.Kvs[0].Value, &f); {
	case err != nil || f.Format != formatName || f.Version < 1:
		return nil, fmt.Errorf("etcd at %s: %s is not what violin has written; choose another prefix", c.where(), key)
	case f.Version > FormatVersion:
		return nil, fmt.Errorf("the metadata in etcd at %s has format version %d, this violin reads version %d and older: %w; use that", c.where(), f.Version, FormatVersion, ErrVersion)
	}
	return &f, nil
}

// CheckFormat refuses the metadata of a store that this version can't read.
func (c *Client) CheckFormat(ctx context.Context, storeID string) error {
	_, err := c.readFormat(ctx, storeID)
	return err
}

// Bind says which store's documents are meant, and the highest term that is known of
// elsewhere, or 0: an etcd that was put back from a copy has forgotten it. Bind is to be
// called once, before any of the documents' methods. Where there is nothing of that store yet, take is called with the
// documents, to bring in what is elsewhere, and what it has written counts when it has
// returned nil. In an etcd elsewhere there must be no other store's.
func (l *Leadership) Bind(ctx context.Context, storeID string, known uint64, take func(context.Context) error) error {
	c := l.client
	l.base = c.key(storeID + "/")
	f, err := c.readFormat(ctx, storeID)
	if err != nil {
		return err
	}
	if f == nil {
		if err := l.alone(ctx, storeID); err != nil {
			return err
		}
		if err := take(ctx); err != nil {
			return fmt.Errorf("bring documents into etcd at %s: %w", c.where(), err)
		}
		f = &format{}
	}
	if f.Origin == 0 || uint64(f.Origin+l.revision) <= known {
		*f = format{Format: formatName, Version: FormatVersion, Origin: max(time.Now().UnixMilli(), int64(known)+1)}
		value, err := json.Marshal(f)
		if err != nil {
			return err
		}
		if _, err := l.write(ctx, nil, clientv3.OpPut(l.base+formatKey, string(value))); err != nil {
			return fmt.Errorf("begin metadata: %w", err)
		}
	}
	l.origin = f.Origin
	return l.sweep(ctx)
}

// alone refuses to begin a store's metadata beside another's, which servers that are
// to stand by for each other would have by mistake.
func (l *Leadership) alone(ctx context.Context, storeID string) error {
	if l.client.own != nil {
		return nil
	}
	r, err := l.client.get(ctx, l.client.key(""), clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		return err
	}
	for _, kv := range r.Kvs {
		name := strings.TrimPrefix(string(kv.Key), l.client.key(""))
		if other, ok := strings.CutSuffix(name, "/"+formatKey); ok && other != storeID {
			return fmt.Errorf("etcd at %s has the metadata of store %s below %s, and this server's store is %s: servers of one prefix share one store (--store, and its key); or give this one another --etcd-prefix", l.client.where(), other, l.client.cfg.Prefix, storeID)
		}
	}
	return nil
}

// Term numbers leaders: each has a higher one than those before it, also across etcds.
// It is known after [Leadership.Bind].
func (l *Leadership) Term() uint64 { return uint64(l.origin + l.revision) }

func (l *Leadership) document(name string) string { return l.base + documentDir + name }
func (l *Leadership) part(id string, n int) string {
	return fmt.Sprintf("%s%s%s/%04d", l.base, partDir, id, n)
}

// Create implements [store.Documents].
func (l *Leadership) Create(ctx context.Context, name string, data []byte) error {
	key := l.document(name)
	return l.put(ctx, key, data, clientv3.Compare(clientv3.CreateRevision(key), "=", 0))
}

// Replace implements [store.Documents].
func (l *Leadership) Replace(ctx context.Context, name string, data []byte) error {
	return l.put(ctx, l.document(name), data)
}

// put writes a document. Its parts, if it has any, come first; a document that does not
// come to be leaves them for [Leadership.sweep].
func (l *Leadership) put(ctx context.Context, key string, data []byte, conditions ...clientv3.Cmp) error {
	value := append([]byte{whole}, data...)
	if len(data) > partSize {
		p := parts{ID: rand.Text(), Size: len(data), Sum: sha256.Sum256(data)}
		for rest := data; len(rest) > 0; p.Count++ {
			n := min(len(rest), partSize)
			if _, err := l.write(ctx, nil, clientv3.OpPut(l.part(p.ID, p.Count), string(rest[:n]))); err != nil {
				return err
			}
			rest = rest[n:]
		}
		text, err := json.Marshal(p)
		if err != nil {
			return err
		}
		value = append([]byte{divided}, text...)
	}
	old, err := l.partsOf(ctx, key)
	if err != nil {
		return err
	}
	ops := []clientv3.Op{clientv3.OpPut(key, string(value))}
	if old != "" && len(conditions) == 0 {
		ops = append(ops, clientv3.OpDelete(old, clientv3.WithPrefix()))
	}
	done, err := l.write(ctx, conditions, ops...)
	if err == nil && !done {
		err = store.ErrExists
	}
	return err
}

// partsOf is what the keys of a document's parts begin with; empty if it has none.
func (l *Leadership) partsOf(ctx context.Context, key string) (string, error) {
	if l.life.Err() != nil {
		return "", ErrDeposed
	}
	r, err := l.client.get(ctx, key)
	if err != nil || len(r.Kvs) == 0 {
		return "", err
	}
	p, err := l.parse(key, r.Kvs[0].Value)
	if err != nil || p == nil {
		return "", nil // of one that cannot be read, sweep finds what is left
	}
	return l.base + partDir + p.ID + "/", nil
}

// parse reads a document's value. It has no parts if they are nil.
func (l *Leadership) parse(key string, value []byte) (*parts, error) {
	damaged := func(why string) error {
		return fmt.Errorf("%w: %s in etcd at %s: %s", store.ErrDamaged, key, l.client.where(), why)
	}
	if len(value) == 0 || value[0] > divided {
		return nil, damaged("not what violin has written")
	}
	if value[0] == whole {
		return nil, nil
	}
	p := &parts{}
	if err := json.Unmarshal(value[1:], p); err != nil || p.ID == "" || strings.Contains(p.ID, "/") || p.Size > store.MaxDocument+partSize {
		return nil, damaged("where its parts are cannot be read")
	}
	return p, nil
}

// Get implements [store.Documents].
func (l *Leadership) Get(ctx context.Context, name string) ([]byte, error) {
	key := l.document(name)
	r, err := l.client.get(ctx, key)
	if err != nil {
		return nil, err
	}
	if len(r.Kvs) == 0 {
		return nil, store.ErrMissing
	}
	p, err := l.parse(key, r.Kvs[0].Value)
	if err != nil {
		return nil, err
	}
	if p == nil {
		return r.Kvs[0].Value[1:], nil
	}
	at := clientv3.WithRev(r.Header.Revision) // it may be replaced meanwhile
	var data []byte
	for n := range p.Count {
		r, err := l.client.get(ctx, l.part(p.ID, n), at)
		if err != nil {
			return nil, err
		}
		for _, kv := range r.Kvs {
			data = append(data, kv.Value...)
		}
	}
	if len(data) != p.Size || sha256.Sum256(data) != p.Sum {
		return nil, fmt.Errorf("%w: %s in etcd at %s: its parts are not those that were written", store.ErrDamaged, key, l.client.where())
	}
	return data, nil
}

// List implements [store.Documents].
func (l *Leadership) List(ctx context.Context, dir string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		for key, err := range l.keys(ctx, l.document(dir)+"/") {
			if !yield(strings.TrimPrefix(key, l.base+documentDir), err) || err != nil {
				return
			}
		}
	}
}

// keys yields the keys that begin with a prefix, in their order.
func (l *Leadership) keys(ctx context.Context, prefix string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		from, end := prefix, clientv3.GetPrefixRangeEnd(prefix)
		for {
			r, err := l.client.get(ctx, from, clientv3.WithRange(end), clientv3.WithKeysOnly(), clientv3.WithLimit(page))
			if err != nil {
				yield("", err)
				return
			}
			for _, kv := range r.Kvs {
				if !yield(string(kv.Key), nil) {
					return
				}
				from = string(kv.Key) + "\x00"
			}
			if !r.More {
				return
			}
		}
	}
}

// Delete implements [store.Documents].
func (l *Leadership) Delete(ctx context.Context, name string) error {
	key := l.document(name)
	ops := []clientv3.Op{clientv3.OpDelete(key)}
	old, err := l.partsOf(ctx, key)
	if err != nil {
		return err
	}
	if old != "" {
		ops = append(ops, clientv3.OpDelete(old, clientv3.WithPrefix()))
	}
	_, err = l.write(ctx, nil, ops...)
	return err
}

// sweep removes the parts of documents that never came to be: a server was killed, or
// the name was taken.
func (l *Leadership) sweep(ctx context.Context) error {
	found := map[string]bool{}
	for key, err := range l.keys(ctx, l.base+partDir) {
		if err != nil {
			return err
		}
		id, _, _ := strings.Cut(strings.TrimPrefix(key, l.base+partDir), "/")
		found[id] = true
	}
	if len(found) == 0 {
		return nil
	}
	for key, err := range l.keys(ctx, l.base+documentDir) {
		if err != nil {
			return err
		}
		r, err := l.client.get(ctx, key)
		if err != nil {
			return err
		}
		for _, kv := range r.Kvs {
			if p, err := l.parse(key, kv.Value); err != nil {
				return nil // whose parts they are is not known
			} else if p != nil {
				delete(found, p.ID)
			}
		}
	}
	var errs []error
	for id := range found {
		_, err := l.write(ctx, nil, clientv3.OpDelete(l.base+partDir+id+"/", clientv3.WithPrefix()))
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
