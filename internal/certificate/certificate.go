package certificate

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/zeebo/blake3"
)

// Format is the version that this package writes and reads.
const Format = 1

// Certificate is the evidence of one cut. Instants are in nanoseconds: those of
// a [Node] and of a [Host]'s answers by the steady clock of its host, from when
// the host was told to prepare; those of a [Round] and [Node.Heard] by that of
// the coordinator, from when the cut was asked for. No two clocks are compared.
type Certificate struct {
	Format   int    `json:"format"`
	Slice    string `json:"slice"`
	Snapshot string `json:"snapshot"`
	Parent   string `json:"parent"` // empty for the first
	// ParentCertificate is the parent's fingerprint, so that a history is a chain;
	// zero if there is no parent or it has no certificate.
	ParentCertificate Hash    `json:"parent_certificate"`
	Mode              string  `json:"mode"`
	From              uint8   `json:"from"` // the epoch that the cut left
	To                uint8   `json:"to"`   // and the one that it led to
	Topology          Hash    `json:"topology"`
	QuietNS           int64   `json:"quiet_ns"`         // silence after which a frame counts as lost
	Nodes             []Node  `json:"nodes,omitempty"`  // by name
	Hosts             []Host  `json:"hosts,omitempty"`  // by name
	Rounds            []Round `json:"rounds,omitempty"` // of counters: the last two, and before them the first that read the same
	Lost              []Loss  `json:"lost,omitempty"`   // what the coordinator took for lost; by channel
	Channel           Channel `json:"channel"`
}

// Blob is a reference into the store.
type Blob struct {
	Hash Hash  `json:"hash"`
	Size int64 `json:"size"`
}

// Channel is the file of the recorded frames.
type Channel struct {
	Blob   Blob `json:"blob"`
	Frames int  `json:"frames"`
}

// Node is one node's part in the cut.
type Node struct {
	Name   string `json:"name"`
	Host   string `json:"host"`
	CutAt  int64  `json:"cut_at_ns"` // since 1970, by its host's clock, when the vCPUs stopped
	Device Blob   `json:"device"`
	Memory Blob   `json:"memory"`
	Disks  []Disk `json:"disks,omitempty"` // in the order of the topology

	Steps []Step `json:"steps,omitempty"` // in the order in which they were done
	Heard int64  `json:"heard_ns"`
	Gate  Gate   `json:"gate"`
	// Recorded is the channel state to the node, in the order in which it was recorded.
	Recorded []Frame `json:"recorded,omitempty"`
}

// Disk is a disk as it was while the vCPUs stood still, in the capture step.
type Disk struct {
	Name   string `json:"name"`
	Blocks Blob   `json:"blocks"`
}

// Step is one step of a node's cut. It is in the list when all that it says was
// true: for close, flip and open, that the switch has answered a barrier after
// the change and its cached decisions have been purged.
type Step struct {
	Name  string `json:"name"`
	Began int64  `json:"began_ns"`
	Ended int64  `json:"ended_ns"`
	// Epochs of the node's gate, before and after the step.
	From uint8 `json:"from"`
	To   uint8 `json:"to"`
}

// Gate counts frames for a node from its host's preparation to the end of
// recording.
type Gate struct {
	Handed uint64 `json:"handed"` // came from the switch, which had not delivered them
	// Taken were taken back out of the device of a node that did not read them: the switch
	// had delivered them, or the gate.
	Taken     uint64 `json:"taken,omitempty"`
	Held      uint64 `json:"held"`      // of both, waited
	Delivered uint64 `json:"delivered"` // of both, were given to the node
	Waiting   uint64 `json:"waiting"`   // of both, still waited at the end
	Failed    uint64 `json:"failed"`    // of both, the switch did not take
	Newer     uint64 `json:"newer"`     // were delivered though of a newer epoch than the node's
	Copies    uint64 `json:"copies"`    // came as copies of frames of the epoch that the node had just left
	Older     uint64 `json:"older"`     // were delivered after the flip, and of an older epoch
	Recorded  uint64 `json:"recorded"`  // were recorded, as the gate counts
	Late      uint64 `json:"late"`      // were older and delivered before the flip
}

// Frame is one recorded frame.
type Frame struct {
	Interface int   `json:"interface"`
	Epoch     uint8 `json:"epoch"` // the sender's
	At        int64 `json:"at_ns"` // from the node's cut; 0 if it came while the gate was closed
	Size      int   `json:"size"`
	Hash      Hash  `json:"hash"` // of its bytes
}

// Host counts what its switch gave to its controller alone, since the host
// prepared, and what of it came.
type Host struct {
	Name   string `json:"name"`
	Handed uint64 `json:"handed"`
	Seen   uint64 `json:"seen"`
}

// Round is one reading of all hosts' counters of the epoch that the cut left.
type Round struct {
	Number  int      `json:"number"`
	Asked   int64    `json:"asked_ns"`
	Ended   int64    `json:"ended_ns"`          // the last answer was heard
	Answers []Answer `json:"answers,omitempty"` // by host
}

// Answer is one host's.
type Answer struct {
	Host   string  `json:"host"`
	Read   int64   `json:"read_ns"`          // before the first counter was read
	Counts []Count `json:"counts,omitempty"` // by channel; none that is 0
}

// Count is one host's view of a channel, in frames since the epoch began. A
// channel from a host to itself is the way of the copies for the record, from its
// switch to its gates.
type Count struct {
	From     string `json:"from"`
	To       string `json:"to"`
	Network  string `json:"network"`
	Sent     uint64 `json:"sent"`
	Received uint64 `json:"received"`
}

// Loss is what a channel was given and did not bring.
type Loss struct {
	From    string `json:"from"`
	To      string `json:"to"`
	Network string `json:"network"`
	Frames  uint64 `json:"frames"`
}

// Hash is a BLAKE3-256; as text, 64 hexadecimal digits.
type Hash [32]byte

func (h Hash) String() string { return hex.EncodeToString(h[:]) }

// MarshalText implements [encoding.TextMarshaler].
func (h Hash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (h *Hash) UnmarshalText(text []byte) error {
	b, err := hex.DecodeString(string(text))
	if err != nil || len(b) != len(h) {
		return fmt.Errorf("%q is no hash, want %d hexadecimal digits", text, 2*len(h))
	}
	copy(h[:], b)
	return nil
}

// Sum returns the hash of b.
func Sum(b []byte) Hash { return blake3.Sum256(b) }

// Encode returns the certificate's bytes, the same for the same certificate. Its
// fingerprint is their [Sum].
func Encode(c *Certificate) ([]byte, error) {
	b, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("encode certificate: %w", err)
	}
	return b, nil
}

// Decode reads what Encode has written, and nothing else: of two texts that say
// the same, one is refused. After an error the certificate is nil.
func Decode(b []byte) (*Certificate, error) {
	fail := func(err error) (*Certificate, error) { return nil, fmt.Errorf("read certificate: %w", err) }
	var head struct {
		Format int `json:"format"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return fail(err)
	}
	if head.Format != Format {
		return fail(fmt.Errorf("format %d, where this violin knows %d only", head.Format, Format))
	}
	var c Certificate
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&c); err != nil {
		return fail(err)
	}
	again, err := Encode(&c)
	if err != nil {
		return fail(err)
	}
	if !bytes.Equal(again, b) {
		return fail(errors.New("not in the form in which certificates are written"))
	}
	return &c, nil
}
