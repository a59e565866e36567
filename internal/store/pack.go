package store

import (
	"bytes"
	"crypto/cipher"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"
	"sync"
)

// The byte format of a pack, version 3. Version 1 had no method: it was zstd; version 2 had no MinLZ.
// docs/store.md is the authority; all integers are big-endian.
//
//	header   32 bytes  magic "violpack", version, kind, sealing, method, 4 zero bytes, pack id
//	entries            stored bytes, back to back
//	footer             40 bytes an entry: hash 32, stored length 4, plain length 4
//	trailer  48 bytes  entry count 4, footer length 4, BLAKE3-256 of all before it, magic "packend\n"
const (
	packVersion = 3
	headerSize  = 32
	trailerSize = 48
	footerEntry = HashSize + 8

	headMagic = "violpack"
	tailMagic = "packend\n"

	// maxPackSize bounds what is accepted as a pack, in bytes: an offset has
	// 27 bits in the index.
	maxPackSize = 1 << 27
	// maxStoredPage bounds a stored page: a length has 13 bits in the index.
	maxStoredPage = 1<<13 - 1
)

// A kind says what a pack holds. The two are kept apart so that checking and
// marking read metadata without dragging pages along.
type kind byte

const (
	kindPages  kind = 'p'
	kindChunks kind = 'c'
)

func (k kind) String() string {
	switch k {
	case kindPages:
		return "page"
	case kindChunks:
		return "chunk"
	}
	return fmt.Sprintf("kind(%#02x)", byte(k))
}

// packID is random and fixed before the first byte is written: the key of an
// encrypted pack is derived from it.
type packID [16]byte

func (id packID) String() string { return hex.EncodeToString(id[:]) }

const packPrefix = "packs/"

// name is the pack's object name. Two digits of the identifier make a
// directory, as some file systems dislike very large ones.
func (id packID) name() string {
	s := id.String()
	return packPrefix + s[:2] + "/" + s
}

// parsePackName is the inverse of name.
func parsePackName(name string) (packID, bool) {
	rest, ok := strings.CutPrefix(name, packPrefix)
	if !ok || len(rest) != 3+32 {
		return packID{}, false
	}
	var id packID
	if n, err := hex.Decode(id[:], []byte(rest[3:])); err != nil || n != len(id) || id.name() != name {
		return packID{}, false
	}
	return id, true
}

// An entry is one line of a pack's footer, with its offset worked out.
type entry struct {
	hash   Hash
	offset uint32 // from the start of the pack
	stored uint32 // bytes in the pack, including an encrypted entry's tag
	plain  uint32 // bytes of content
}

// A builder is a pack in the making. Room is reserved under a lock and filled
// outside of it, so that several workers compress into one pack at a time.
type builder struct {
	id      packID
	no      uint32 // number in the store's table
	kind    kind
	method  method
	seal    cipher.AEAD // nil: not encrypted
	buf     []byte      // never moves: its capacity is fixed
	limit   int         // of the whole pack, in bytes
	entries []entry
	pending sync.WaitGroup // reservations not yet filled
}

func newBuilder(id packID, k kind, m method, seal cipher.AEAD, buf []byte, limit int) *builder {
	b := &builder{id: id, kind: k, method: m, seal: seal, limit: limit}
	b.buf = append(buf[:0], headMagic...)
	b.buf = append(b.buf, packVersion, byte(k), sealing(seal), byte(m), 0, 0, 0, 0)
	b.buf = append(b.buf, id[:]...)
	return b
}

func sealing(seal cipher.AEAD) byte {
	if seal == nil {
		return sealNone
	}
	return sealAESGCM
}

// overhead is what sealing adds to an entry's length.
func overhead(seal cipher.AEAD) int {
	if seal == nil {
		return 0
	}
	return seal.Overhead()
}

// fits reports whether an entry of n bytes before sealing fits, with its line in the footer.
func (b *builder) fits(n int) bool {
	footer := (len(b.entries)+1)*footerEntry + overhead(b.seal)
	return len(b.buf)+n+overhead(b.seal)+footer+trailerSize <= b.limit
}

// reserve makes room for an entry of n bytes before sealing; fits must have
// said yes. The caller passes the results to fill, from any goroutine.
func (b *builder) reserve(h Hash, n, plain int) (entry, []byte) {
	e := entry{hash: h, offset: uint32(len(b.buf)), stored: uint32(n + overhead(b.seal)), plain: uint32(plain)}
	end := len(b.buf) + int(e.stored)
	b.buf = b.buf[:end]
	b.entries = append(b.entries, e)
	b.pending.Add(1)
	return e, b.buf[e.offset:end:end]
}

// fill puts the entry's bytes in their place, sealed if the pack is.
func (b *builder) fill(e entry, place, data []byte) {
	defer b.pending.Done()
	if b.seal == nil {
		copy(place, data)
		return
	}
	b.seal.Seal(place[:0], nonce(e.offset), data, nil)
}

// finish waits for reservations, appends footer and trailer, and parses the
// result again as a reader would: a pack that cannot be read back is not
// written. The builder must not be reserved from any more.
func (b *builder) finish() ([]byte, error) {
	b.pending.Wait()
	start, pack := len(b.buf), b.buf
	for _, e := range b.entries {
		pack = append(pack, e.hash[:]...)
		pack = binary.BigEndian.AppendUint32(pack, e.stored)
		pack = binary.BigEndian.AppendUint32(pack, e.plain)
	}
	if b.seal != nil {
		pack = b.seal.Seal(pack[:start], nonce(uint32(start)), pack[start:], nil)
	}
	footer := len(pack) - start
	pack = binary.BigEndian.AppendUint32(pack, uint32(len(b.entries)))
	pack = binary.BigEndian.AppendUint32(pack, uint32(footer))
	digest := Sum(pack)
	pack = append(pack, digest[:]...)
	pack = append(pack, tailMagic...)

	h, err := parseHeader(pack)
	if err != nil {
		return nil, fmt.Errorf("parse pack %s again before writing it: %w", b.id, err)
	}
	got, err := parseFooter(pack[start:], int64(len(pack)), h, b.seal)
	if err != nil {
		return nil, fmt.Errorf("parse pack %s again before writing it: %w", b.id, err)
	}
	if h.id != b.id || h.kind != b.kind || h.method != b.method || len(got) != len(b.entries) {
		return nil, fmt.Errorf("parse pack %s again before writing it: header or count differs from what was put in", b.id)
	}
	for i := range got {
		if got[i] != b.entries[i] {
			return nil, fmt.Errorf("parse pack %s again before writing it: entry %d differs from what was put in", b.id, i)
		}
	}
	return pack, nil
}

type header struct {
	kind    kind
	method  method
	sealing byte
	id      packID
}

// parseHeader reads the first headerSize bytes of a pack.
func parseHeader(b []byte) (header, error) {
	var h header
	if len(b) < headerSize {
		return h, fmt.Errorf("%w: header: %d bytes, want %d", ErrDamaged, len(b), headerSize)
	}
	if string(b[:8]) != headMagic {
		return h, fmt.Errorf("%w: header: byte 0: magic %q, want %q", ErrDamaged, b[:8], headMagic)
	}
	if b[8] < 1 || b[8] > packVersion {
		return h, fmt.Errorf("header: byte 8: pack format version %d, this violin reads versions 1 to %d; use the violin that wrote it or a later one", b[8], packVersion)
	}
	k := kind(b[9])
	if k != kindPages && k != kindChunks {
		return h, fmt.Errorf("%w: header: byte 9: unknown kind %#02x", ErrDamaged, b[9])
	}
	if b[10] != sealNone && b[10] != sealAESGCM {
		return h, fmt.Errorf("%w: header: byte 10: unknown sealing %d", ErrDamaged, b[10])
	}
	m := method(b[11])
	if m > methodMinLZ || m.since() > b[8] {
		return h, fmt.Errorf("%w: header: byte 11: unknown compression %d", ErrDamaged, b[11])
	}
	if !bytes.Equal(b[12:16], make([]byte, 4)) {
		return h, fmt.Errorf("%w: header: bytes 12-15 are not zero", ErrDamaged)
	}
	return header{kind: k, method: m, sealing: b[10], id: packID(b[16:headerSize])}, nil
}

// footerLen reads the trailer in the last bytes of tail and returns how many
// bytes footer and trailer take together.
func footerLen(tail []byte, size int64) (count, length int, err error) {
	if len(tail) < trailerSize {
		return 0, 0, fmt.Errorf("%w: trailer: %d bytes, want %d", ErrDamaged, len(tail), trailerSize)
	}
	t := tail[len(tail)-trailerSize:]
	if string(t[40:]) != tailMagic {
		return 0, 0, fmt.Errorf("%w: trailer: magic %q, want %q", ErrDamaged, t[40:], tailMagic)
	}
	count = int(binary.BigEndian.Uint32(t))
	n := int64(binary.BigEndian.Uint32(t[4:]))
	if size > maxPackSize || n > size-headerSize-trailerSize {
		return 0, 0, fmt.Errorf("%w: trailer: footer of %d bytes in a pack of %d", ErrDamaged, n, size)
	}
	return count, int(n) + trailerSize, nil
}

// parseFooter reads footer and trailer, which end tail, of a pack of size
// bytes whose header is h.
func parseFooter(tail []byte, size int64, h header, seal cipher.AEAD) ([]entry, error) {
	count, length, err := footerLen(tail, size)
	if err != nil {
		return nil, err
	}
	if h.sealing != sealing(seal) {
		return nil, fmt.Errorf("pack sealing is %d, but the store's is %d: %w", h.sealing, sealing(seal), ErrKey)
	}
	if length > len(tail) {
		return nil, fmt.Errorf("%w: footer: %d bytes, want %d", ErrDamaged, len(tail), length)
	}
	footer := tail[len(tail)-length : len(tail)-trailerSize]
	end := size - int64(length) // where the entries end
	if seal != nil {
		// A copy: the caller's bytes stay what they are in the pack.
		footer, err = seal.Open(nil, nonce(uint32(end)), footer, nil)
		if err != nil {
			return nil, fmt.Errorf("%w: footer: %w", ErrDamaged, err)
		}
	}
	if len(footer) != count*footerEntry {
		return nil, fmt.Errorf("%w: footer: %d bytes for %d entries, want %d", ErrDamaged, len(footer), count, count*footerEntry)
	}
	entries := make([]entry, 0, count)
	offset := int64(headerSize)
	for i := range count {
		line := footer[i*footerEntry:]
		e := entry{
			hash:   Hash(line[:HashSize]),
			offset: uint32(offset),
			stored: binary.BigEndian.Uint32(line[HashSize:]),
			plain:  binary.BigEndian.Uint32(line[HashSize+4:]),
		}
		if err := e.check(h.kind, overhead(seal)); err != nil {
			return nil, fmt.Errorf("%w: footer: entry %d: %w", ErrDamaged, i, err)
		}
		offset += int64(e.stored)
		if offset > end {
			return nil, fmt.Errorf("%w: footer: entry %d ends at byte %d, beyond the entries' end at %d", ErrDamaged, i, offset, end)
		}
		entries = append(entries, e)
	}
	if offset != end {
		return nil, fmt.Errorf("%w: footer: entries end at byte %d, want %d", ErrDamaged, offset, end)
	}
	return entries, nil
}

// check refuses lengths that no writer produces.
func (e entry) check(k kind, overhead int) error {
	if int64(e.stored) < int64(overhead)+1 || int64(e.stored)-int64(overhead) > int64(e.plain) {
		return fmt.Errorf("stored length %d for %d plain bytes", e.stored, e.plain)
	}
	switch {
	case k == kindPages && e.plain != PageSize:
		return fmt.Errorf("page of %d bytes", e.plain)
	case k == kindPages && e.stored > maxStoredPage:
		return fmt.Errorf("page stored in %d bytes", e.stored)
	case k == kindChunks && e.plain > ChunkSize:
		return fmt.Errorf("chunk of %d bytes", e.plain)
	}
	return nil
}

// checkDigest verifies the trailer's digest over a whole pack.
func checkDigest(pack []byte) error {
	if len(pack) < headerSize+trailerSize {
		return fmt.Errorf("%w: %d bytes are no pack", ErrDamaged, len(pack))
	}
	at := len(pack) - trailerSize + 8
	if Sum(pack[:at]) != Hash(pack[at:at+HashSize]) {
		return fmt.Errorf("%w: digest of the pack's bytes does not match its trailer", ErrDamaged)
	}
	return nil
}

// openEntry returns the plain bytes of an entry stored as data, appended to
// buf, verified against the hash. plain is the length they must have.
func openEntry(buf, data []byte, h Hash, offset, plain uint32, m method, seal cipher.AEAD, codec *codec) ([]byte, error) {
	out, err := unpackEntry(buf, data, offset, plain, m, seal, codec)
	if err != nil {
		return nil, err
	}
	if Sum(out[len(buf):]) != h {
		return nil, errOtherContent
	}
	return out, nil
}

var errOtherContent = fmt.Errorf("%w: content does not have this hash", ErrDamaged)

// unpackEntry is openEntry without a look at the hash, which is the caller's to take.
func unpackEntry(buf, data []byte, offset, plain uint32, m method, seal cipher.AEAD, codec *codec) ([]byte, error) {
	if seal != nil {
		var room []byte
		if len(data) <= len(pageBuf{}) { // a page: no memory for each, it is copied out below
			scratch := pageBufs.Get().(*pageBuf)
			defer pageBufs.Put(scratch)
			room = scratch[:0]
		}
		var err error
		data, err = seal.Open(room, nonce(offset), data, nil)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
		}
	}
	out := buf
	if uint32(len(data)) == plain {
		out = append(out, data...)
	} else {
		var err error
		out, err = codec.decompress(m, buf, data, int(plain))
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
		}
	}
	if got := len(out) - len(buf); uint32(got) != plain {
		return nil, fmt.Errorf("%w: %d bytes of content, want %d", ErrDamaged, got, plain)
	}
	return out, nil
}
