package cloudinit

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"unicode/utf16"
)

// The volume: FAT12, of 512-byte sectors in clusters of 2 KiB, in as much as a seed takes
// at most. Every field is as in Microsoft's "FAT: General Overview of On-Disk Format" 1.03.
const (
	sector      = 512
	cluster     = 4 * sector
	volumeSize  = 2 << 20
	sectors     = volumeSize / sector
	fatSectors  = 3 // for 1021 clusters and two entries before theirs, of 12 bits
	fats        = 2
	rootEntries = 64
	entrySize   = 32
	rootStart   = (1 + fats*fatSectors) * sector
	dataStart   = rootStart + rootEntries*entrySize
	clusters    = (volumeSize - dataStart) / cluster
	media       = 0xf8     // a fixed disk
	volumeID    = 0x766c6e // any: it is no part of what tells one seed from another
	chainEnd    = 0xfff
)

// The attributes of directory entries.
const (
	attrReadOnly = 0x01
	attrLabel    = 0x08
	attrLongName = 0x0f
)

// The date of everything: there is none that would be the same each time. 1 January 1980
// is the first that there can be.
const fatDate = 1<<5 | 1

type file struct {
	name string
	data []byte
}

// volume makes a file system of files in its root directory. The same files make the same
// bytes.
func volume(label string, files []file) ([]byte, error) {
	le := binary.LittleEndian
	v := make([]byte, volumeSize)
	boot := v[:sector]
	copy(boot, []byte{0xeb, 0x3c, 0x90})                  // a jump, by which a FAT is known, to
	copy(boot[62:], []byte{0xcd, 0x18, 0xf4, 0xeb, 0xfd}) // int 18h, by which a BIOS that tries to boot it goes on to the next; hlt
	copy(boot[3:], "MSDOS5.0")
	le.PutUint16(boot[11:], sector)
	boot[13] = cluster / sector
	le.PutUint16(boot[14:], 1) // reserved sectors: this one
	boot[16] = fats
	le.PutUint16(boot[17:], rootEntries)
	le.PutUint16(boot[19:], sectors)
	boot[21] = media
	le.PutUint16(boot[22:], fatSectors)
	le.PutUint16(boot[24:], 32) // sectors a track, and heads: of use to nobody
	le.PutUint16(boot[26:], 64)
	boot[36] = 0x80
	boot[38] = 0x29 // what follows is there
	le.PutUint32(boot[39:], volumeID)
	copy(boot[43:], fmt.Sprintf("%-11.11s%-8s", label, "FAT12"))
	le.PutUint16(boot[510:], 0xaa55)

	root := v[rootStart:rootStart]
	e := entry(fmt.Sprintf("%-11.11s", label), attrLabel, 0, 0)
	root = append(root, e[:]...)
	table := make([]uint16, clusters+2)
	table[0], table[1] = 0xf00|media, chainEnd
	next := 2
	for i, f := range files {
		first := 0
		for rest := f.data; len(rest) > 0; next++ {
			if next >= len(table) {
				return nil, fmt.Errorf("%d bytes in %s and the files before it are more than a seed of %d KiB holds", len(f.data), f.name, volumeSize>>10)
			}
			if first == 0 {
				first = next
			} else {
				table[next-1] = uint16(next)
			}
			table[next] = chainEnd
			n := copy(v[dataStart+(next-2)*cluster:][:cluster], rest)
			rest = rest[n:]
		}
		root = append(root, named(f.name, i, first, len(f.data))...)
	}
	if len(root) > rootEntries*entrySize {
		return nil, fmt.Errorf("%d files are more than a seed holds", len(files))
	}
	for i, n := range table {
		for k := range fats {
			at := sector + k*fatSectors*sector + i*3/2
			if i%2 == 0 {
				v[at], v[at+1] = byte(n), v[at+1]|byte(n>>8)
			} else {
				v[at], v[at+1] = v[at]|byte(n<<4), byte(n>>4)
			}
		}
	}
	return v, nil
}

// entry is a directory entry by a name of 8 and 3 characters.
func entry(short string, attributes byte, first, size int) (e [entrySize]byte) {
	le := binary.LittleEndian
	copy(e[:11], short)
	e[11] = attributes
	le.PutUint16(e[16:], fatDate) // created
	le.PutUint16(e[18:], fatDate) // read
	le.PutUint16(e[24:], fatDate) // written
	le.PutUint16(e[26:], uint16(first))
	le.PutUint32(e[28:], uint32(size))
	return e
}

// named is the directory entries of a file: those of its name, last part first, and the
// one by a short name, which is made of its number.
func named(name string, number, first, size int) []byte {
	short := fmt.Sprintf("FILE~%-6d", number)
	var sum byte
	for _, c := range []byte(short) {
		sum = sum>>1 | sum<<7
		sum += c
	}
	const perEntry = 13
	chars := utf16.Encode([]rune(name))
	if len(chars)%perEntry != 0 {
		chars = append(chars, 0)
		for len(chars)%perEntry != 0 {
			chars = append(chars, 0xffff)
		}
	}
	var entries []byte
	parts := slices.Collect(slices.Chunk(chars, perEntry))
	for i := len(parts) - 1; i >= 0; i-- {
		var e [entrySize]byte
		e[0] = byte(i + 1)
		if i == len(parts)-1 {
			e[0] |= 0x40
		}
		e[11], e[13] = attrLongName, sum
		var text bytes.Buffer
		_ = binary.Write(&text, binary.LittleEndian, parts[i]) // to a buffer: it does not fail
		b := text.Bytes()
		copy(e[1:11], b)
		copy(e[14:26], b[10:])
		copy(e[28:32], b[22:])
		entries = append(entries, e[:]...)
	}
	e := entry(short, attrReadOnly, first, size)
	return append(entries, e[:]...)
}
