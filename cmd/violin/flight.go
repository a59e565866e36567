package main

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	flight "violin/internal/frames"
)

func (a *app) framesText(ctx context.Context, snapshot string) error {
	if err := checkSnapshotName(snapshot); err != nil {
		return err
	}
	p := a.progress()
	defer p.done()
	c, err := a.startServer(ctx, p)
	if err != nil {
		return err
	}
	cs, err := channelState(ctx, c, snapshot)
	if err != nil {
		return err
	}
	p.done()
	return a.writeFlight(a.out, cs)
}

// channelState fetches what was in flight at a snapshot's cut.
func channelState(ctx context.Context, c violinv1connect.SliceServiceClient, snapshot string) (*flight.ChannelState, error) {
	stream, err := c.Frames(ctx, &violinv1.FramesRequest{Snapshot: snapshot})
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	var b bytes.Buffer
	for stream.Receive() {
		b.Write(stream.Msg().GetData())
	}
	if err := stream.Err(); err != nil {
		return nil, err
	}
	cs, err := flight.Read(&b)
	if err != nil {
		return nil, fmt.Errorf("frames of snapshot %s: %w", snapshot, err)
	}
	return cs, nil
}

// writeFlight tells what was in flight, a line a frame.
func (a *app) writeFlight(w io.Writer, cs *flight.ChannelState) error {
	if len(cs.Frames) == 0 {
		_, err := fmt.Fprintln(w, "no frame was in flight")
		return err
	}
	t := newTable(">AT", "NETWORK", "TO", ">EPOCH", ">BYTES", "FRAME")
	for _, f := range cs.Frames {
		r := cs.Receivers[f.Receiver]
		t.row("+"+formatDuration(f.At), r.Network, fmt.Sprintf("%s:%d", r.Node, r.Interface), fmt.Sprint(f.Epoch), fmt.Sprint(len(f.Data)), describe(f.Data))
	}
	var b bytes.Buffer
	t.write(&b)
	_, err := w.Write(b.Bytes())
	return err
}

// describe says in a line what a frame is, as far as it can be told.
func describe(data []byte) string {
	p := gopacket.NewPacket(data, layers.LayerTypeEthernet, gopacket.DecodeOptions{Lazy: true, NoCopy: true})
	eth, ok := p.Layer(layers.LayerTypeEthernet).(*layers.Ethernet)
	if !ok {
		return "no Ethernet frame"
	}
	if arp, ok := p.Layer(layers.LayerTypeARP).(*layers.ARP); ok {
		what := "is at " + fmt.Sprint(eth.SrcMAC)
		if arp.Operation == layers.ARPRequest {
			what = "asks for " + address(arp.DstProtAddress)
		}
		return "ARP " + address(arp.SourceProtAddress) + " " + what
	}
	n := p.NetworkLayer()
	if n == nil {
		return fmt.Sprintf("%s > %s %s", eth.SrcMAC, eth.DstMAC, eth.EthernetType)
	}
	from, to := n.NetworkFlow().Endpoints()
	switch l := p.TransportLayer().(type) {
	case *layers.TCP:
		return fmt.Sprintf("%s:%d > %s:%d TCP %sseq %d, %d bytes", from, uint16(l.SrcPort), to, uint16(l.DstPort), tcpFlags(l), l.Seq, len(l.Payload))
	case *layers.UDP:
		return fmt.Sprintf("%s:%d > %s:%d UDP %d bytes", from, uint16(l.SrcPort), to, uint16(l.DstPort), len(l.Payload))
	}
	what := ""
	for _, l := range p.Layers() {
		if l.LayerType() != gopacket.LayerTypePayload {
			what = l.LayerType().String()
		}
	}
	return fmt.Sprintf("%s > %s %s", from, to, what)
}

func address(b []byte) string {
	if len(b) == 4 {
		return fmt.Sprintf("%d.%d.%d.%d", b[0], b[1], b[2], b[3])
	}
	return fmt.Sprintf("%x", b)
}

func tcpFlags(l *layers.TCP) (s string) {
	for _, f := range []struct {
		set  bool
		name string
	}{{l.SYN, "SYN "}, {l.FIN, "FIN "}, {l.RST, "RST "}, {l.PSH, "PSH "}, {l.ACK, "ACK "}} {
		if f.set {
			s += f.name
		}
	}
	return s
}
