package frames

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"time"
	"unicode/utf8"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"

	"violin/internal/cut"
)

// Format is the version that Write writes and Read reads.
const Format = 1

// ChannelState is what was in flight when a slice was cut.
type ChannelState struct {
	Slice    string
	Snapshot string // id; may be empty

	// Receivers are the interfaces that frames were recorded for, or could have
	// been: those without a frame tell of their node's cut all the same.
	Receivers []Receiver

	// Frames are in the order of arrival, for each receiver. None came before
	// the receiver's cut.
	Frames []Frame
}

// Receiver is an interface of a node, and the node's cut.
type Receiver struct {
	Node      string
	Interface int // index among the node's interfaces
	Network   string
	Epoch     cut.Epoch // that the cut took the node to

	// Cut is the instant of the cut by the clock of the node's host, in UTC and
	// whole nanoseconds, from 1970 on. The zero Time if it is not known: the
	// frames' times are then counted from 1970.
	Cut time.Time
}

// Frame is one recorded frame.
type Frame struct {
	Receiver int           // index into Receivers
	Epoch    cut.Epoch     // the sender's, when it sent the frame: older than the receiver's
	At       time.Duration // from the receiver's cut to the arrival; not negative
	Data     []byte        // from the destination's address on, without the check sequence
}

// Error is a file that does not hold a channel state.
type Error struct {
	Offset  int64  // in bytes, of the end of what was read: the mistake is before it
	Section string // what was being read, such as "packet 3"
	Err     error
}

func (e *Error) Error() string {
	return fmt.Sprintf("channel state: %s, before byte %d: %v", e.Section, e.Offset, e.Err)
}

func (e *Error) Unwrap() error { return e.Err }

// The comments.
type (
	sectionInfo struct {
		Format   int    `json:"format"`
		Slice    string `json:"slice"`
		Snapshot string `json:"snapshot,omitempty"`
		Frames   int    `json:"frames"`
	}
	receiverInfo struct {
		Node      string     `json:"node"`
		Interface int        `json:"interface"`
		Network   string     `json:"network"`
		Epoch     cut.Epoch  `json:"epoch"`
		Cut       *time.Time `json:"cut,omitempty"`
	}
	frameInfo struct {
		Epoch *cut.Epoch `json:"epoch"`
	}
)

// maxComment is what an option of pcapng has room for, in bytes.
const maxComment = math.MaxUint16

func comment(v any) (string, error) {
	b, err := json.Marshal(v)
	if err == nil && len(b) > maxComment {
		err = fmt.Errorf("%d bytes of names, more than pcapng has room for", len(b))
	}
	return string(b), err
}

// Write writes the channel state. What Read then reads is the same.
func Write(w io.Writer, cs *ChannelState) error {
	fail := func(err error) error { return fmt.Errorf("write channel state of slice %q: %w", cs.Slice, err) }
	if !utf8.ValidString(cs.Slice) || !utf8.ValidString(cs.Snapshot) {
		return fail(errors.New("a name is not UTF-8"))
	}
	about, err := comment(sectionInfo{Format, cs.Slice, cs.Snapshot, len(cs.Frames)})
	if err != nil {
		return fail(err)
	}
	interfaces := make([]pcapgo.NgInterface, len(cs.Receivers))
	for i, r := range cs.Receivers {
		if interfaces[i], err = describe(r); err != nil {
			return fail(fmt.Errorf("interface %d of node %q: %w", r.Interface, r.Node, err))
		}
	}
	if len(interfaces) == 0 {
		// The writer wants one. Read passes over an interface without a comment.
		interfaces = []pcapgo.NgInterface{{Name: "none", LinkType: layers.LinkTypeEthernet}}
	}

	ng, err := pcapgo.NewNgWriterInterface(w, interfaces[0], pcapgo.NgWriterOptions{
		SectionInfo: pcapgo.NgSectionInfo{Application: "violin", Comment: about},
	})
	if err != nil {
		return fail(err)
	}
	for _, i := range interfaces[1:] {
		if _, err := ng.AddInterface(i); err != nil {
			return fail(err)
		}
	}
	for i, f := range cs.Frames {
		if err := cs.write(ng, f); err != nil {
			return fail(fmt.Errorf("frame %d: %w", i, err))
		}
	}
	if err := ng.Flush(); err != nil {
		return fail(err)
	}
	return nil
}

func describe(r Receiver) (pcapgo.NgInterface, error) {
	if !utf8.ValidString(r.Node) || !utf8.ValidString(r.Network) {
		return pcapgo.NgInterface{}, errors.New("a name is not UTF-8")
	}
	info := receiverInfo{Node: r.Node, Interface: r.Interface, Network: r.Network, Epoch: r.Epoch}
	if !r.Cut.IsZero() {
		if !representable(r.Cut) {
			return pcapgo.NgInterface{}, fmt.Errorf("cut at %v, which pcapng has no nanoseconds for", r.Cut)
		}
		t := r.Cut.UTC()
		info.Cut = &t
	}
	about, err := comment(info)
	if err != nil {
		return pcapgo.NgInterface{}, err
	}
	return pcapgo.NgInterface{
		Name:        fmt.Sprintf("%s:%d", r.Node, r.Interface),
		Description: fmt.Sprintf("network %s, cut into epoch %d", r.Network, r.Epoch),
		Comment:     about,
		LinkType:    layers.LinkTypeEthernet,
	}, nil
}

// representable tells whether t is a time in nanoseconds since 1970.
func representable(t time.Time) bool {
	return t.Unix() >= 0 && t.Before(time.Unix(0, math.MaxInt64))
}

// start is what the frames' times are counted from, in nanoseconds since 1970.
func (r Receiver) start() int64 {
	if r.Cut.IsZero() {
		return 0
	}
	return r.Cut.UnixNano()
}

func (cs *ChannelState) write(ng *pcapgo.NgWriter, f Frame) error {
	if f.Receiver < 0 || f.Receiver >= len(cs.Receivers) {
		return fmt.Errorf("receiver %d of %d", f.Receiver, len(cs.Receivers))
	}
	start := cs.Receivers[f.Receiver].start()
	if f.At < 0 || int64(f.At) > math.MaxInt64-start {
		return fmt.Errorf("arrived %v after its receiver's cut", f.At)
	}
	about, err := comment(frameInfo{&f.Epoch})
	if err != nil {
		return err
	}
	return ng.WritePacketWithOptions(gopacket.CaptureInfo{
		Timestamp:      time.Unix(0, start+int64(f.At)),
		CaptureLength:  len(f.Data),
		Length:         len(f.Data),
		InterfaceIndex: f.Receiver,
	}, f.Data, pcapgo.NgPacketOptions{Comments: []string{about}})
}

// Read reads what Write has written, to the end of r. A mistake is an [*Error],
// and the channel state is nil then. Memory is in proportion to what is read.
func Read(r io.Reader) (*ChannelState, error) {
	d := decoder{source: &counter{r: r}}
	d.r = bufio.NewReader(d.source)
	cs, err := d.decode()
	if err != nil {
		return nil, &Error{Offset: d.source.n - int64(d.r.Buffered()), Section: d.section, Err: err}
	}
	return cs, nil
}

// counter counts what is read.
type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

type decoder struct {
	source  *counter
	r       *bufio.Reader // over source
	section string        // what is being read
	cs      ChannelState
	index   []int // of the receiver, by pcapng interface; -1 if it is none
}

func (d *decoder) decode() (*ChannelState, error) {
	d.section = "section header"
	// Looked at here, for the reader below would unpack gzip as well, whose
	// content may be far larger than it.
	magic, err := d.r.Peek(4)
	if err != nil {
		return nil, truncated(err)
	}
	if binary.LittleEndian.Uint32(magic) != 0x0a0d0d0a {
		return nil, errors.New("not a pcapng file")
	}
	sections := 1
	ng, err := pcapgo.NewNgReader(d.r, pcapgo.NgReaderOptions{
		WantMixedLinkType:  true, // else it skips what is not Ethernet
		SectionEndCallback: func([]pcapgo.NgInterface, pcapgo.NgSectionInfo) { sections++ },
	})
	if err != nil {
		return nil, truncated(err)
	}
	var about sectionInfo
	if err := parse(ng.SectionInfo().Comment, &about); err != nil {
		return nil, err
	}
	if about.Format != Format {
		return nil, fmt.Errorf("format %d, where this violin knows %d only", about.Format, Format)
	}
	d.cs.Slice, d.cs.Snapshot = about.Slice, about.Snapshot

	for {
		d.section = fmt.Sprintf("packet %d", len(d.cs.Frames))
		data, ci, options, err := ng.ReadPacketDataWithOptions()
		if sections > 1 {
			return nil, errors.New("a second section")
		}
		// New interfaces may have come before the packet, or before the end.
		if err := d.receivers(ng); err != nil {
			return nil, err
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		if err := d.frame(data, ci, options); err != nil {
			return nil, err
		}
	}
	d.section = "end of the file"
	if len(d.cs.Frames) != about.Frames {
		return nil, fmt.Errorf("%d frames, where the file says that it holds %d", len(d.cs.Frames), about.Frames)
	}
	return &d.cs, nil
}

// receivers takes in the interfaces that the reader has come across since.
func (d *decoder) receivers(ng *pcapgo.NgReader) error {
	for i := len(d.index); i < ng.NInterfaces(); i++ {
		section := d.section
		d.section = fmt.Sprintf("interface description %d", i)
		intf, err := ng.Interface(i)
		if err != nil {
			return err
		}
		if intf.Comment == "" {
			d.index = append(d.index, -1)
			d.section = section
			continue
		}
		if intf.LinkType != layers.LinkTypeEthernet {
			return fmt.Errorf("link type %v, want Ethernet", intf.LinkType)
		}
		var info receiverInfo
		if err := parse(intf.Comment, &info); err != nil {
			return err
		}
		r := Receiver{Node: info.Node, Interface: info.Interface, Network: info.Network, Epoch: info.Epoch}
		if info.Cut != nil {
			r.Cut = info.Cut.UTC()
			if !representable(r.Cut) {
				return fmt.Errorf("cut at %v", r.Cut)
			}
		}
		d.index = append(d.index, len(d.cs.Receivers))
		d.cs.Receivers = append(d.cs.Receivers, r)
		d.section = section
	}
	return nil
}

func (d *decoder) frame(data []byte, ci gopacket.CaptureInfo, options pcapgo.NgPacketOptions) error {
	receiver := d.index[ci.InterfaceIndex]
	if receiver < 0 {
		return fmt.Errorf("for interface %d, which is not described", ci.InterfaceIndex)
	}
	if ci.Length != len(data) {
		return fmt.Errorf("%d bytes of a frame of %d", len(data), ci.Length)
	}
	if len(options.Comments) == 0 {
		return errors.New("no comment")
	}
	var info frameInfo
	// The first is ours: Wireshark adds a user's own after it.
	if err := parse(options.Comments[0], &info); err != nil {
		return err
	}
	if info.Epoch == nil {
		return errors.New("no epoch in the comment")
	}
	start := d.cs.Receivers[receiver].start()
	if !representable(ci.Timestamp) || ci.Timestamp.UnixNano() < start {
		return fmt.Errorf("arrived at %v, before its receiver's cut", ci.Timestamp)
	}
	d.cs.Frames = append(d.cs.Frames, Frame{
		Receiver: receiver,
		Epoch:    *info.Epoch,
		At:       time.Duration(ci.Timestamp.UnixNano() - start),
		Data:     data,
	})
	return nil
}

// parse reads a comment.
func parse(s string, v any) error {
	if s == "" {
		return errors.New("no comment: this is not a channel state that violin wrote")
	}
	if err := json.Unmarshal([]byte(s), v); err != nil {
		return fmt.Errorf("comment: %w", err)
	}
	return nil
}

// truncated is err, for the beginning of a file, where an end is never right.
func truncated(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
