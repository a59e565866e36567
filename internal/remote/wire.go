package remote

import (
	"encoding/json"
	"fmt"
	"math"
	"net"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	violinv1 "violin/api/violin/v1"
	"violin/internal/agent"
	"violin/internal/certificate"
	"violin/internal/cut"
	"violin/internal/hypervisor/qemu"
	"violin/internal/store"
)

func encodeBlob(b store.BlobRef) *violinv1.Blob {
	return &violinv1.Blob{Hash: b.Hash[:], Size: b.Size}
}

func decodeBlob(m *violinv1.Blob) (store.BlobRef, error) {
	b := store.BlobRef{Size: m.GetSize()}
	if len(m.GetHash()) != store.HashSize || b.Size < 0 {
		return store.BlobRef{}, fmt.Errorf("a blob of %d bytes with a hash of %d, want %d", b.Size, len(m.GetHash()), store.HashSize)
	}
	copy(b.Hash[:], m.GetHash())
	return b, nil
}

// epoch is one byte of the wire format's four.
func epoch(n uint32) (cut.Epoch, error) {
	if n > math.MaxUint8 {
		return 0, fmt.Errorf("epoch %d, want at most %d", n, math.MaxUint8)
	}
	return cut.Epoch(n), nil
}

func number(n uint32) (uint16, error) {
	if n > math.MaxUint16 {
		return 0, fmt.Errorf("number %d, want at most %d", n, math.MaxUint16)
	}
	return uint16(n), nil
}

// cutOf is the cut that an effect is of.
func cutOf(ef cut.Effect) string {
	switch e := ef.(type) {
	case cut.SendPrepare:
		return e.Cut
	case cut.SendCut:
		return e.Cut
	case cut.SendPoll:
		return e.Cut
	case cut.SendCollect:
		return e.Cut
	case cut.SendCommit:
		return e.Cut
	case cut.SendAbort:
		return e.Cut
	}
	return ""
}

// encodeOrder leaves the run and the session to its caller.
func encodeOrder(o agent.Order) (*violinv1.CutRequest, error) {
	m := &violinv1.CutRequest{Cut: cutOf(o.Effect)}
	switch e := o.Effect.(type) {
	case cut.SendPrepare:
		p := &violinv1.PrepareOrder{
			From: uint32(e.From), To: uint32(e.To), Precopy: o.Mode == qemu.Precopy, Newer: uint32(o.Newer),
			HoldFrames: uint64(o.Limits.Frames), HoldBytes: uint64(o.Limits.Bytes), Halt: o.Halt, Networks: map[uint32]string{},
		}
		for n, name := range o.Networks {
			p.Networks[uint32(n)] = name
		}
		m.Order = &violinv1.CutRequest_Prepare{Prepare: p}
	case cut.SendCut:
		c := &violinv1.CutOrder{Nodes: e.Nodes, To: uint32(e.To)}
		if !o.At.IsZero() {
			c.At = timestamppb.New(o.At)
		}
		m.Order = &violinv1.CutRequest_Nodes{Nodes: c}
	case cut.SendPoll:
		m.Order = &violinv1.CutRequest_Poll{Poll: &violinv1.PollOrder{Round: int64(e.Round), Epoch: uint32(e.Epoch)}}
	case cut.SendCollect:
		m.Order = &violinv1.CutRequest_Collect{Collect: &violinv1.CollectOrder{}}
	case cut.SendCommit:
		m.Order = &violinv1.CutRequest_Commit{Commit: &violinv1.CommitOrder{}}
	case cut.SendAbort:
		m.Order = &violinv1.CutRequest_Abort{Abort: &violinv1.AbortOrder{To: uint32(e.To)}}
	default:
		return nil, fmt.Errorf("%T is no order for a host", o.Effect)
	}
	return m, nil
}

// decodeOrder leaves the session to its caller. host is the one that is ordered.
func decodeOrder(m *violinv1.CutRequest, slice, host string) (agent.Order, error) {
	o := agent.Order{Slice: slice}
	var err error
	switch e := m.GetOrder().(type) {
	case *violinv1.CutRequest_Prepare:
		p := e.Prepare
		prepare := cut.SendPrepare{Cut: m.GetCut(), Host: host}
		if prepare.From, err = epoch(p.GetFrom()); err != nil {
			return o, err
		}
		if prepare.To, err = epoch(p.GetTo()); err != nil {
			return o, err
		}
		if p.GetHoldBytes() > math.MaxInt32 || p.GetHoldFrames() > math.MaxInt32 || p.GetNewer() > uint32(agent.Drop) {
			return o, fmt.Errorf("hold at most %d frames, %d bytes, policy %d: out of range", p.GetHoldFrames(), p.GetHoldBytes(), p.GetNewer())
		}
		o.Effect, o.Halt, o.Newer = prepare, p.GetHalt(), agent.Newer(p.GetNewer())
		o.Limits = cut.Limits{Frames: int(p.GetHoldFrames()), Bytes: int(p.GetHoldBytes())}
		o.Mode = qemu.Background
		if p.GetPrecopy() {
			o.Mode = qemu.Precopy
		}
		o.Networks = map[uint16]string{}
		for n, name := range p.GetNetworks() {
			id, err := number(n)
			if err != nil {
				return o, err
			}
			o.Networks[id] = name
		}
	case *violinv1.CutRequest_Nodes:
		c := cut.SendCut{Cut: m.GetCut(), Host: host, Nodes: e.Nodes.GetNodes()}
		if c.To, err = epoch(e.Nodes.GetTo()); err != nil {
			return o, err
		}
		o.Effect = c
		if at := e.Nodes.GetAt(); at != nil {
			o.At = at.AsTime()
		}
	case *violinv1.CutRequest_Poll:
		p := cut.SendPoll{Cut: m.GetCut(), Host: host, Round: int(e.Poll.GetRound())}
		if p.Epoch, err = epoch(e.Poll.GetEpoch()); err != nil {
			return o, err
		}
		o.Effect = p
	case *violinv1.CutRequest_Collect:
		o.Effect = cut.SendCollect{Cut: m.GetCut(), Host: host}
	case *violinv1.CutRequest_Commit:
		o.Effect = cut.SendCommit{Cut: m.GetCut(), Host: host}
	case *violinv1.CutRequest_Abort:
		a := cut.SendAbort{Cut: m.GetCut(), Host: host}
		if a.To, err = epoch(e.Abort.GetTo()); err != nil {
			return o, err
		}
		o.Effect = a
	default:
		return o, fmt.Errorf("order %T is unknown: the server is of another version", m.GetOrder())
	}
	return o, nil
}

// encodeEvent tells, too, whether the event is a cut's last on its host.
func encodeEvent(ev cut.Event) (m *violinv1.CutResponse, last bool, err error) {
	switch e := ev.(type) {
	case cut.Prepared:
		return &violinv1.CutResponse{Cut: e.Cut, Event: &violinv1.CutResponse_Prepared{Prepared: &violinv1.PreparedEvent{}}}, false, nil
	case cut.NodeCut:
		return &violinv1.CutResponse{Cut: e.Cut, Event: &violinv1.CutResponse_NodeCut{NodeCut: &violinv1.NodeEvent{Node: e.Node}}}, false, nil
	case cut.Stored:
		return &violinv1.CutResponse{Cut: e.Cut, Event: &violinv1.CutResponse_Stored{Stored: &violinv1.NodeEvent{Node: e.Node}}}, false, nil
	case cut.Counters:
		c := &violinv1.CountersEvent{Round: int64(e.Round)}
		for _, n := range e.Counts {
			c.Counts = append(c.Counts, &violinv1.ChannelCount{From: n.From, To: n.To, Network: n.Network, Sent: n.Sent, Received: n.Received})
		}
		return &violinv1.CutResponse{Cut: e.Cut, Event: &violinv1.CutResponse_Counters{Counters: c}}, false, nil
	case cut.Collected:
		return &violinv1.CutResponse{Cut: e.Cut, Event: &violinv1.CutResponse_Collected{Collected: &violinv1.CollectedEvent{}}}, false, nil
	case cut.Committed:
		return &violinv1.CutResponse{Cut: e.Cut, Event: &violinv1.CutResponse_Committed{Committed: &violinv1.CommittedEvent{}}}, true, nil
	case cut.Aborted:
		return &violinv1.CutResponse{Cut: e.Cut, Event: &violinv1.CutResponse_Aborted{Aborted: &violinv1.AbortedEvent{}}}, true, nil
	case cut.Failed:
		return &violinv1.CutResponse{Cut: e.Cut, Event: &violinv1.CutResponse_Failed{Failed: &violinv1.FailedEvent{Node: e.Node, Reason: e.Reason}}}, false, nil
	}
	return nil, false, fmt.Errorf("%T is no event of a host", ev)
}

// decodeEvent believes a host's connection, not its messages, who it is.
func decodeEvent(m *violinv1.CutResponse, host string) (ev cut.Event, last bool, err error) {
	switch e := m.GetEvent().(type) {
	case *violinv1.CutResponse_Prepared:
		return cut.Prepared{Cut: m.GetCut(), Host: host}, false, nil
	case *violinv1.CutResponse_NodeCut:
		return cut.NodeCut{Cut: m.GetCut(), Node: e.NodeCut.GetNode()}, false, nil
	case *violinv1.CutResponse_Stored:
		return cut.Stored{Cut: m.GetCut(), Node: e.Stored.GetNode()}, false, nil
	case *violinv1.CutResponse_Counters:
		c := cut.Counters{Cut: m.GetCut(), Host: host, Round: int(e.Counters.GetRound())}
		for _, n := range e.Counters.GetCounts() {
			c.Counts = append(c.Counts, cut.ChannelCount{
				Channel: cut.Channel{From: n.GetFrom(), To: n.GetTo(), Network: n.GetNetwork()}, Sent: n.GetSent(), Received: n.GetReceived(),
			})
		}
		return c, false, nil
	case *violinv1.CutResponse_Collected:
		return cut.Collected{Cut: m.GetCut(), Host: host}, false, nil
	case *violinv1.CutResponse_Committed:
		return cut.Committed{Cut: m.GetCut(), Host: host}, true, nil
	case *violinv1.CutResponse_Aborted:
		return cut.Aborted{Cut: m.GetCut(), Host: host}, true, nil
	case *violinv1.CutResponse_Failed:
		return cut.Failed{Cut: m.GetCut(), Host: host, Node: e.Failed.GetNode(), Reason: e.Failed.GetReason()}, false, nil
	}
	return nil, false, fmt.Errorf("event %T of host %s is unknown: its agent is of another version", m.GetEvent(), host)
}

// witness is a node's part in a certificate.
type witness struct {
	Steps []certificate.Step `json:"steps"`
	Gate  certificate.Gate   `json:"gate"`
}

func encodePorts(ifs []agent.Interface) (ports []*violinv1.NodePort) {
	for _, i := range ifs {
		ports = append(ports, &violinv1.NodePort{Network: uint32(i.Network), Mac: i.Address, Mtu: uint32(i.MTU), Model: i.Model})
	}
	return ports
}

func decodePorts(ports []*violinv1.NodePort) ([]agent.Interface, error) {
	var ifs []agent.Interface
	for _, p := range ports {
		network, err := number(p.GetNetwork())
		if err != nil {
			return nil, err
		}
		mac, err := decodeMAC(p.GetMac())
		if err != nil {
			return nil, err
		}
		ifs = append(ifs, agent.Interface{Network: network, Address: mac, MTU: int(p.GetMtu()), Model: p.GetModel()})
	}
	return ifs, nil
}

func decodeMAC(b []byte) (net.HardwareAddr, error) {
	if len(b) != 6 {
		return nil, fmt.Errorf("a hardware address of %d bytes, want 6", len(b))
	}
	return b, nil
}

// sendResults sends a host's results in parts, of which none is large.
func sendResults(r agent.HostResult, send func(*violinv1.ResultsResponse) error) error {
	for _, n := range r.Nodes {
		evidence, err := json.Marshal(witness{n.Steps, n.Gate})
		if err != nil {
			return err
		}
		m := &violinv1.NodeResult{
			Node: n.Node, CutAt: timestamppb.New(n.CutAt), Pause: durationpb.New(n.Pause), Device: encodeBlob(n.Device), Memory: encodeBlob(n.Memory),
			Pages: n.Stats.Pages, ZeroPages: n.Stats.ZeroPages, MemoryBytes: n.Stats.RawBytes, SentPages: n.Stats.SentPages,
			NewPages: n.Stats.NewPages, StoredBytes: n.Stats.StoredBytes,
			RawBytes: n.RawBytes, Held: n.Held, Ports: encodePorts(n.Interface), Witness: evidence,
		}
		for _, d := range n.Disks {
			m.Disks = append(m.Disks, &violinv1.DiskResult{
				Name: d.Name, Size: d.Size, Blocks: encodeBlob(d.Blocks), Pages: d.Stats.Pages, ZeroPages: d.Stats.ZeroPages,
				RawBytes: d.Stats.RawBytes, SentPages: d.Stats.SentPages, NewPages: d.Stats.NewPages, StoredBytes: d.Stats.StoredBytes,
			})
		}
		if err := send(&violinv1.ResultsResponse{Part: &violinv1.ResultsResponse_Node{Node: m}}); err != nil {
			return err
		}
		for _, f := range n.Recorded {
			m := &violinv1.RecordedFrame{Interface: uint32(f.Interface), Epoch: uint32(f.Epoch), At: timestamppb.New(f.At), Data: f.Data}
			if err := send(&violinv1.ResultsResponse{Part: &violinv1.ResultsResponse_Frame{Frame: m}}); err != nil {
				return err
			}
		}
	}
	m := &violinv1.HostResult{Handed: r.Counters.Handed, Seen: r.Counters.Seen, Dropped: r.Dropped, Reads: map[int64]int64{}}
	for round, at := range r.Reads {
		m.Reads[int64(round)] = at
	}
	return send(&violinv1.ResultsResponse{Part: &violinv1.ResultsResponse_Host{Host: m}})
}

// addResult takes one part of a host's results. It tells whether it was the last.
func addResult(r *agent.HostResult, m *violinv1.ResultsResponse) (done bool, err error) {
	switch p := m.GetPart().(type) {
	case *violinv1.ResultsResponse_Node:
		n, err := decodeNodeResult(p.Node)
		if err != nil {
			return false, fmt.Errorf("result of node %q: %w", p.Node.GetNode(), err)
		}
		r.Nodes = append(r.Nodes, n)
	case *violinv1.ResultsResponse_Frame:
		if len(r.Nodes) == 0 {
			return false, fmt.Errorf("a recorded frame of no node")
		}
		n := &r.Nodes[len(r.Nodes)-1]
		e, err := epoch(p.Frame.GetEpoch())
		if err != nil {
			return false, err
		}
		if int(p.Frame.GetInterface()) >= len(n.Interface) {
			return false, fmt.Errorf("a recorded frame for interface %d of node %q, which has %d", p.Frame.GetInterface(), n.Node, len(n.Interface))
		}
		n.Recorded = append(n.Recorded, agent.Recorded{
			Node: n.Node, Interface: int(p.Frame.GetInterface()), Epoch: e, At: p.Frame.GetAt().AsTime(), Data: p.Frame.GetData(),
		})
	case *violinv1.ResultsResponse_Host:
		r.Counters = certificate.Host{Name: r.Host, Handed: p.Host.GetHanded(), Seen: p.Host.GetSeen()}
		r.Dropped, r.Reads = p.Host.GetDropped(), map[int]int64{}
		for round, at := range p.Host.GetReads() {
			r.Reads[int(round)] = at
		}
		return true, nil
	default:
		return false, fmt.Errorf("part %T is unknown: the agent is of another version", m.GetPart())
	}
	return false, nil
}

func decodeNodeResult(m *violinv1.NodeResult) (agent.NodeResult, error) {
	n := agent.NodeResult{
		Node: m.GetNode(), CutAt: m.GetCutAt().AsTime(), Pause: m.GetPause().AsDuration(), RawBytes: m.GetRawBytes(), Held: m.GetHeld(),
		Stats: store.MemoryStats{
			Pages: m.GetPages(), ZeroPages: m.GetZeroPages(), RawBytes: m.GetMemoryBytes(), SentPages: m.GetSentPages(),
			NewPages: m.GetNewPages(), StoredBytes: m.GetStoredBytes(),
		},
	}
	var err error
	if n.Device, err = decodeBlob(m.GetDevice()); err != nil {
		return n, err
	}
	if n.Memory, err = decodeBlob(m.GetMemory()); err != nil {
		return n, err
	}
	if n.Interface, err = decodePorts(m.GetPorts()); err != nil {
		return n, err
	}
	for _, d := range m.GetDisks() {
		blocks, err := decodeBlob(d.GetBlocks())
		if err != nil {
			return n, fmt.Errorf("disk %q: %w", d.GetName(), err)
		}
		n.Disks = append(n.Disks, agent.Disk{Name: d.GetName(), Size: d.GetSize(), Blocks: blocks, Stats: store.MemoryStats{
			Pages: d.GetPages(), ZeroPages: d.GetZeroPages(), RawBytes: d.GetRawBytes(),
			SentPages: d.GetSentPages(), NewPages: d.GetNewPages(), StoredBytes: d.GetStoredBytes(),
		}})
	}
	var w witness
	if err := json.Unmarshal(m.GetWitness(), &w); err != nil {
		return n, fmt.Errorf("its evidence: %w", err)
	}
	n.Steps, n.Gate = w.Steps, w.Gate
	return n, nil
}

// local is a time as the other end told it; the zero time if it told none.
func local(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}
