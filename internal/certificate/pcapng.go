package certificate

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/gopacket/gopacket/pcapgo"
)

// recorded is a frame as the channel state's file has it.
type recorded struct {
	receiver receiver
	epoch    uint8
	at       int64 // from the receiver's cut
	data     []byte
}

// receiver is an interface in the file.
type receiver struct {
	Node      string    `json:"node"`
	Interface int       `json:"interface"`
	Network   string    `json:"network"`
	Epoch     uint8     `json:"epoch"`
	Cut       time.Time `json:"cut"`
}

// section is the file's own description.
type section struct {
	Format   int    `json:"format"`
	Slice    string `json:"slice"`
	Snapshot string `json:"snapshot"`
	Frames   int    `json:"frames"`
}

// readChannel reads the channel state's file, in its order.
func readChannel(b []byte) (about section, receivers []receiver, frames []recorded, err error) {
	if len(b) < 4 || !bytes.Equal(b[:4], []byte{0x0a, 0x0d, 0x0d, 0x0a}) {
		return about, nil, nil, errors.New("not a pcapng file")
	}
	ng, err := pcapgo.NewNgReader(bytes.NewReader(b), pcapgo.NgReaderOptions{WantMixedLinkType: true})
	if err != nil {
		return about, nil, nil, err
	}
	if err := json.Unmarshal([]byte(ng.SectionInfo().Comment), &about); err != nil {
		return about, nil, nil, fmt.Errorf("comment of the section: %w", err)
	}
	described := func() error {
		for i := len(receivers); i < ng.NInterfaces(); i++ {
			intf, err := ng.Interface(i)
			if err != nil {
				return err
			}
			var r receiver
			if intf.Comment != "" {
				if err := json.Unmarshal([]byte(intf.Comment), &r); err != nil {
					return fmt.Errorf("comment of interface %d: %w", i, err)
				}
			}
			receivers = append(receivers, r)
		}
		return nil
	}
	for {
		data, ci, options, err := ng.ReadPacketDataWithOptions()
		if derr := described(); derr != nil {
			return about, nil, nil, derr
		}
		if err == io.EOF {
			return about, receivers, frames, nil
		}
		if err != nil {
			return about, nil, nil, fmt.Errorf("frame %d: %w", len(frames), err)
		}
		var info struct {
			Epoch *uint8 `json:"epoch"`
		}
		if len(options.Comments) == 0 || json.Unmarshal([]byte(options.Comments[0]), &info) != nil || info.Epoch == nil {
			return about, nil, nil, fmt.Errorf("frame %d: no epoch in its comment", len(frames))
		}
		if ci.InterfaceIndex < 0 || ci.InterfaceIndex >= len(receivers) {
			return about, nil, nil, fmt.Errorf("frame %d: interface %d of %d", len(frames), ci.InterfaceIndex, len(receivers))
		}
		r := receivers[ci.InterfaceIndex]
		frames = append(frames, recorded{
			receiver: r, epoch: *info.Epoch, at: ci.Timestamp.UnixNano() - r.Cut.UnixNano(), data: bytes.Clone(data),
		})
	}
}
