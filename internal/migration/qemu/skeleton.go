package qemu

import (
	"bytes"
	"encoding"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// A Skeleton is a stream without its pages: what [Encode] needs besides the
// pages to write the stream anew. The exported fields tell what is in it;
// they are read-only.
type Skeleton struct {
	Machine string     // machine type, such as "pc-i440fx-7.2"; the restoring QEMU must have the same
	Blocks  []RAMBlock // in the order of the stream
	Devices []Device   // in the order of the stream

	head       []byte // from the magic to the footer of RAM's START section
	ramAt      int    // where in head RAM's START section begins
	ramID      uint32 // RAM's section number
	switchover bool   // the command "switchover start" was sent
	end        bool   // RAM had an END section
	tail       []byte // from the first device's section to the last byte
}

// A Device is one device's state, opaque.
type Device struct {
	Name     string // QEMU's name, such as "0000:00:02.0/virtio-net"
	Instance uint32 // tells apart devices of one name
	Version  uint32 // of the state's format
	Size     int    // in bytes, without the section's header and footer
}

var (
	_ encoding.BinaryMarshaler   = (*Skeleton)(nil)
	_ encoding.BinaryUnmarshaler = (*Skeleton)(nil)
)

// MarshalBinary returns the skeleton as a stream that holds no page record.
// So it has QEMU's own format and version.
func (s *Skeleton) MarshalBinary() ([]byte, error) {
	if len(s.head) == 0 {
		return nil, errors.New("marshal skeleton: it is empty")
	}
	b := bytes.Clone(s.head)
	b = s.appendRAMEnd(b)
	return append(b, s.tail...), nil
}

// UnmarshalBinary is the inverse of MarshalBinary. After an error the
// skeleton is as it was.
func (s *Skeleton) UnmarshalBinary(b []byte) error {
	d := NewDecoder(bytes.NewReader(b))
	d.pageless = true
	d.MaxDeviceBytes = len(b)
	sk, err := d.Decode(func([]RAMBlock) (PageSink, error) { return nil, nil })
	if err != nil {
		return fmt.Errorf("unmarshal skeleton: %w", err)
	}
	*s = *sk
	return nil
}

// appendRAMEnd appends what comes between the last page and the devices.
func (s *Skeleton) appendRAMEnd(b []byte) []byte {
	if s.switchover {
		b = append(b, secCommand)
		b = binary.BigEndian.AppendUint16(b, cmdSwitchoverStart)
		b = binary.BigEndian.AppendUint16(b, 0)
	}
	if s.end {
		b = append(b, secEnd)
		b = binary.BigEndian.AppendUint32(b, s.ramID)
		b = s.appendPartEnd(b)
	}
	return b
}

// appendPartEnd appends the end of a PART or END section of RAM.
func (s *Skeleton) appendPartEnd(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, flagEOS)
	b = append(b, secFooter)
	return binary.BigEndian.AppendUint32(b, s.ramID)
}

// description is the part we need of the JSON that ends a stream.
type description struct {
	PageSize int `json:"page_size"`
	Devices  []struct {
		Name     string `json:"name"`
		Instance int64  `json:"instance_id"`
	} `json:"devices"`
}

// parseDevices reads the tail of a stream, from the first device's section
// to the end. A section's length is not on the wire; only the JSON at the end
// tells which devices there are. It must account for all of them, in order,
// which shows that nothing is missing and nothing unknown is in between.
// An error comes with its offset.
func parseDevices(tail []byte) (devices []Device, off int, err error) {
	end, err := findDescription(tail)
	if err != nil {
		return nil, len(tail), err
	}
	var desc description
	if err := json.Unmarshal(tail[end+6:], &desc); err != nil {
		return nil, end, fmt.Errorf("description of the device state: %w", err)
	}
	if desc.PageSize != PageSize {
		return nil, end, fmt.Errorf("guest pages of %d bytes; only %d bytes are read", desc.PageSize, PageSize)
	}
	if len(desc.Devices) == 0 {
		return nil, end, errors.New("the description lists no device, but there is device state")
	}
	body, p := tail[:end], 0
	for i, dev := range desc.Devices {
		h, ok := parseFull(body[p:], dev.Name, uint32(dev.Instance))
		if !ok {
			return nil, p, fmt.Errorf("state of device %q instance %d must begin here, as the description at the end of the stream says", dev.Name, dev.Instance)
		}
		start := p + h.size
		// The footer is the one that the next device's header, or the end,
		// follows; the same bytes within the state are not.
		footer := binary.BigEndian.AppendUint32([]byte{secFooter}, h.id)
		for q := start; ; q++ {
			n := bytes.Index(body[q:], footer)
			if n < 0 {
				return nil, p, fmt.Errorf("state of device %q instance %d has no end", dev.Name, dev.Instance)
			}
			q += n
			next := body[q+len(footer):]
			if i+1 == len(desc.Devices) {
				ok = len(next) == 0
			} else {
				_, ok = parseFull(next, desc.Devices[i+1].Name, uint32(desc.Devices[i+1].Instance))
			}
			if ok {
				devices = append(devices, Device{Name: dev.Name, Instance: uint32(dev.Instance), Version: h.version, Size: q - start})
				p = q + len(footer)
				break
			}
		}
	}
	return devices, 0, nil
}

// findDescription returns where the end of the device state is, the byte EOF
// that the description follows.
func findDescription(tail []byte) (int, error) {
	// JSON holds no zero byte, and the length before it, short of 16 MiB,
	// begins with one: so the last zero byte is at most 5 bytes after EOF.
	z := bytes.LastIndexByte(tail, 0)
	for i := max(z-5, 0); i <= z; i++ {
		if b := tail[i:]; len(b) > 6 && b[0] == secEOF && b[1] == secVMDescription &&
			uint64(binary.BigEndian.Uint32(b[2:])) == uint64(len(b)-6) {
			return i, nil
		}
	}
	return 0, fmt.Errorf("the stream ends without a description of its device state: cut short, or the machine has suppress-vmdesc=on, which must be off: %w", io.ErrUnexpectedEOF)
}

// fullHeader is the header of a FULL section.
type fullHeader struct {
	id, version uint32
	size        int // in bytes
}

// parseFull parses the header of a FULL section of that device at the start
// of b.
func parseFull(b []byte, name string, instance uint32) (h fullHeader, ok bool) {
	size := 1 + 4 + 1 + len(name) + 4 + 4
	if len(b) < size || b[0] != secFull || int(b[5]) != len(name) || string(b[6:6+len(name)]) != name ||
		binary.BigEndian.Uint32(b[6+len(name):]) != instance {
		return fullHeader{}, false
	}
	return fullHeader{
		id:      binary.BigEndian.Uint32(b[1:]),
		version: binary.BigEndian.Uint32(b[size-4:]),
		size:    size,
	}, true
}
