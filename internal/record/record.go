// Package record is what an agent writes down for the one that takes over from it: one
// JSON document a record, replaced as a whole. It survives the death of the process at any
// instant, which is all that it is for: with the machine, what it speaks of is gone too.
//
// A record has two files, which are written in turn and in place. (To replace a file by
// renaming another took 13 ms where the file system then writes it out, and a vCPU pause
// waits for this.) Each begins with a line
//
//	violin-record FORMAT SEQUENCE LENGTH CRC
//
// in hexadecimal, of which the last three are of fixed width, and LENGTH bytes of JSON
// follow. CRC is the CRC-32C of the sequence, 8 bytes big-endian, and the JSON. The file that is whole and has the higher sequence counts.
package record

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
)

// format is that of the files. An agent reads no other.
const format = 1

const header = "violin-record %x %016x %08x %08x\n"

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// errFormat is in the error of a record that another version has written.
var errFormat = errors.New("another version of violin wrote it, in a format that this one does not read")

// checksum is that of what a file holds, of its own sequence: parts of two may be there.
func checksum(sequence uint64, content []byte) uint32 {
	return crc32.Update(crc32.Checksum(binary.BigEndian.AppendUint64(nil, sequence), castagnoli), castagnoli, content)
}

func slots(path string) [2]string { return [2]string{path, path + "~"} }

// Write replaces a record. One process at a time may write it.
func Write(path string, v any) error {
	content, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("write down %s: %w", path, err)
	}
	var sequences [2]uint64 // 0 for none
	for i, p := range slots(path) {
		if sequences[i], _, err = read(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("write down %s: %w", path, err)
		}
	}
	older, next := 0, sequences[1]+1
	if sequences[0] > sequences[1] {
		older, next = 1, sequences[0]+1
	}
	f, err := os.OpenFile(slots(path)[older], os.O_WRONLY|os.O_CREATE, 0o600)
	if err == nil {
		b := append(fmt.Appendf(nil, header, format, next, len(content), checksum(next, content)), content...)
		_, err = f.WriteAt(b, 0) // what an older one leaves behind it is not looked at
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return fmt.Errorf("write down %s: %w", path, err)
	}
	return nil
}

// Read reads a record into v. The error is [fs.ErrNotExist] if there is none, also
// if the writer died before the first was whole.
func Read(path string, v any) error {
	var content []byte
	var newest uint64
	for _, p := range slots(path) {
		sequence, b, err := read(p)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("read what an agent wrote down: %s: %w", p, err)
		}
		if sequence > newest {
			newest, content = sequence, b
		}
	}
	if newest == 0 {
		return fmt.Errorf("read what an agent wrote down: %s: %w", path, fs.ErrNotExist)
	}
	if err := json.Unmarshal(content, v); err != nil {
		return fmt.Errorf("read what an agent wrote down: %s: %w", path, err)
	}
	return nil
}

// read reads one of a record's files. The sequence is 0 if it is not whole.
func read(path string) (sequence uint64, content []byte, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, nil, err
	}
	line, rest, ok := bytes.Cut(b, []byte{'\n'})
	var version, length int
	var sum uint32
	n, err := fmt.Sscanf(string(line)+"\n", header, &version, &sequence, &length, &sum)
	switch {
	case n > 0 && version != format:
		return 0, nil, errFormat
	case !ok || err != nil || length < 0 || length > len(rest) || checksum(sequence, rest[:length]) != sum:
		return 0, nil, nil
	}
	return sequence, rest[:length], nil
}
