package server

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"connectrpc.com/connect"

	violinv1 "violin/api/violin/v1"
	"violin/internal/agent"
	"violin/internal/catalog"
	"violin/internal/certificate"
	"violin/internal/coordinator"
	"violin/internal/cut"
	"violin/internal/frames"
	"violin/internal/store"
)

// certify writes the evidence of the cut and binds the snapshot to it. A
// certificate that does not hold is no reason not to seal: it says so itself, and
// what it says is kept.
func (s *Server) certify(ctx context.Context, snap *catalog.Snapshot, session *store.Session, hosts []agent.HostResult,
	channel *frames.ChannelState, lost []cut.ChannelLoss, drained coordinator.Drained,
) error {
	c := evidence(snap, hosts, channel, lost, drained)
	if snap.Parent != "" {
		// A parent that was forgotten, or was taken before there were certificates,
		// ends the chain.
		if p, err := s.catalog.Get(ctx, snap.ParentOf(), snap.Parent); err == nil && p.Certificate != nil {
			c.ParentCertificate = certificate.Hash(p.Certificate.Fingerprint)
		}
	}
	b, err := certificate.Encode(c)
	if err != nil {
		return err
	}
	ref, err := session.PutBlob(ctx, b)
	if err != nil {
		return fmt.Errorf("store the certificate: %w", err)
	}
	snap.Certificate = &catalog.Certificate{Ref: ref, Fingerprint: store.Hash(certificate.Sum(b))}
	return nil
}

func blob(r store.BlobRef) certificate.Blob {
	return certificate.Blob{Hash: certificate.Hash(r.Hash), Size: r.Size}
}

// evidence puts together what the hosts and the coordinator have witnessed.
func evidence(snap *catalog.Snapshot, hosts []agent.HostResult, channel *frames.ChannelState, lost []cut.ChannelLoss, drained coordinator.Drained) *certificate.Certificate {
	from := cut.Epoch(snap.Epoch)
	c := &certificate.Certificate{
		Format: certificate.Format, Slice: snap.Slice, Snapshot: snap.ID, Parent: snap.Parent, Mode: snap.Mode,
		From: uint8(from), To: uint8(from.Next()), Topology: certificate.Sum(snap.Topology), QuietNS: int64(drained.Quiet),
		Channel: certificate.Channel{Blob: blob(snap.Channel.Ref), Frames: len(channel.Frames)},
	}
	reads := map[string]map[int]int64{}
	for _, h := range hosts {
		reads[h.Host] = h.Reads
		c.Hosts = append(c.Hosts, h.Counters)
		for _, r := range h.Nodes {
			n := certificate.Node{
				Name: r.Node, Host: h.Host, CutAt: r.CutAt.UnixNano(), Device: blob(r.Device), Memory: blob(r.Memory),
				Steps: r.Steps, Heard: int64(drained.Heard[r.Node]), Gate: r.Gate,
			}
			for _, d := range r.Disks {
				n.Disks = append(n.Disks, certificate.Disk{Name: d.Name, Blocks: blob(d.Blocks)})
			}
			for _, f := range r.Recorded {
				n.Recorded = append(n.Recorded, certificate.Frame{
					Interface: f.Interface, Epoch: uint8(f.Epoch), At: int64(max(0, f.At.Sub(r.CutAt))), Size: len(f.Data), Hash: certificate.Sum(f.Data),
				})
			}
			c.Nodes = append(c.Nodes, n)
		}
	}
	slices.SortFunc(c.Hosts, func(a, b certificate.Host) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(c.Nodes, func(a, b certificate.Node) int { return cmp.Compare(a.Name, b.Name) })
	for _, r := range drained.Rounds {
		round := certificate.Round{Number: r.Number, Asked: int64(r.Asked), Ended: int64(r.Ended)}
		for host, counts := range r.Counts {
			a := certificate.Answer{Host: host, Read: reads[host][r.Number]}
			for _, n := range coordinator.Canonical(counts) {
				a.Counts = append(a.Counts, certificate.Count{From: n.From, To: n.To, Network: n.Network, Sent: n.Sent, Received: n.Received})
			}
			round.Answers = append(round.Answers, a)
		}
		slices.SortFunc(round.Answers, func(a, b certificate.Answer) int { return cmp.Compare(a.Host, b.Host) })
		c.Rounds = append(c.Rounds, round)
	}
	for _, l := range lost {
		c.Lost = append(c.Lost, certificate.Loss{From: l.From, To: l.To, Network: l.Network, Frames: l.Frames})
	}
	return c
}

// shortest is how much of a fingerprint must be given to mean anything.
const shortest = 16

// Verify implements the API.
func (s *Server) Verify(ctx context.Context, req *violinv1.VerifyRequest) (*violinv1.VerifyResponse, error) {
	want := strings.ToLower(req.GetCertificate())
	if want != "" && (len(want) < shortest || strings.Trim(want, "0123456789abcdef") != "") {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("certificate %q: want the %d or more hexadecimal digits that `violin snapshot` printed", want, shortest))
	}
	snap, err := s.catalog.Resolve(ctx, req.GetSnapshot())
	if errors.Is(err, store.ErrDamaged) {
		return nil, connect.NewError(connect.CodeDataLoss, err)
	}
	if err != nil {
		return nil, apiError(err)
	}
	if snap.Certificate == nil {
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("snapshot %s has no certificate: it was taken by a violin that made none, and cannot be verified", snap.Ref()))
	}
	report, err := s.verify(ctx, snap, req.GetReadData())
	if err != nil {
		return nil, apiError(fmt.Errorf("verify snapshot %s: %w", snap.Ref(), err))
	}
	resp := &violinv1.VerifyResponse{Snapshot: snap.Ref(), Certificate: snap.Certificate.Fingerprint.String()}
	if !strings.HasPrefix(resp.Certificate, want) {
		report.Violations = append(report.Violations, fmt.Sprintf("the snapshot's certificate is %s, and not the one that was expected: %s", resp.Certificate, want))
	}
	resp.Holds, resp.Violations, resp.Cannot, resp.Notes = report.Holds(), report.Violations, report.Cannot, report.Notes
	if resp.Holds {
		resp.Proves = report.Proves
	}
	return resp, nil
}

// verify judges a sealed snapshot. Damage is in the report; an error means that
// it could not be done.
func (s *Server) verify(ctx context.Context, snap *catalog.Snapshot, readData bool) (*certificate.Report, error) {
	var damage []string
	read := func(what string, ref store.BlobRef) ([]byte, error) {
		b, err := s.store.GetBlob(ctx, ref)
		if errors.Is(err, store.ErrDamaged) || errors.Is(err, store.ErrMissing) {
			damage = append(damage, fmt.Sprintf("the %s cannot be read: %v", what, err))
			return nil, nil
		}
		return b, err
	}
	subject := &certificate.Subject{
		Certificate: certificate.Hash(snap.Certificate.Fingerprint),
		Slice:       snap.Slice, ID: snap.ID, Parent: snap.Parent, Mode: snap.Mode, Epoch: snap.Epoch, Topology: snap.Topology,
		Lost: snap.Totals.Lost, Held: snap.Totals.Held, Recorded: snap.Totals.Recorded, Channel: blob(snap.Channel.Ref),
	}
	for _, n := range snap.Nodes {
		var disks []certificate.Disk
		for _, d := range n.Disks {
			disks = append(disks, certificate.Disk{Name: d.Name, Blocks: blob(d.Blocks)})
		}
		subject.Nodes = append(subject.Nodes, certificate.SubjectNode{
			Name: n.Name, Host: n.Host, CutAt: n.CutAt.UnixNano(), Device: blob(n.Device), Memory: blob(n.Memory), Disks: disks, Held: n.Held, Recorded: n.Recorded,
		})
	}
	var err error
	if subject.Bytes, err = read("certificate", snap.Certificate.Ref); err != nil {
		return nil, err
	}
	if subject.ChannelState, err = read("channel state", snap.Channel.Ref); err != nil {
		return nil, err
	}
	report := certificate.Check(subject)
	report.Violations = append(damage, report.Violations...)
	if note := s.chain(ctx, snap, subject.Bytes); note != "" {
		report.Notes = append(report.Notes, note)
	}

	found, err := s.store.Check(ctx, s.catalog.Roots(ctx), store.CheckOptions{ReadData: readData})
	if err != nil {
		return nil, err
	}
	for _, p := range found.Problems {
		// Damage that no snapshot's needs explain, as to a pack's own index, may be
		// this one's.
		if ours := func(root string) bool { return strings.HasPrefix(root, snap.Ref()+" ") }; len(p.Roots) == 0 || slices.ContainsFunc(p.Roots, ours) {
			report.Violations = append(report.Violations, "the store: "+p.Err.Error())
		}
	}
	if readData {
		report.Proves = append(report.Proves, fmt.Sprintf("Every page, and every other piece that the snapshot needs, was read and is what its hash says (%d packs).", found.Packs))
	} else {
		report.Proves = append(report.Proves, "Every page that the snapshot needs is listed in the store's index. The pages were not read: --read-data does that.")
	}
	return report, nil
}

// chain tells what is to be said of the parent that the certificate names.
func (s *Server) chain(ctx context.Context, snap *catalog.Snapshot, b []byte) string {
	c, err := certificate.Decode(b)
	if err != nil || snap.Parent == "" {
		return ""
	}
	p, err := s.catalog.Get(ctx, snap.ParentOf(), snap.Parent)
	switch {
	case errors.Is(err, catalog.ErrNotFound):
		return fmt.Sprintf("its parent %s is not there any more", snap.Parent)
	case err != nil:
		return fmt.Sprintf("its parent %s cannot be read: %v", snap.Parent, err)
	case p.Certificate == nil || c.ParentCertificate == certificate.Hash{}:
		return fmt.Sprintf("its parent %s has no certificate, or had none then", snap.Parent)
	case c.ParentCertificate != certificate.Hash(p.Certificate.Fingerprint):
		return fmt.Sprintf("its parent %s has another certificate than it had when this snapshot was taken: the parent was replaced", snap.Parent)
	}
	return ""
}

// Frames implements the API.
func (s *Server) Frames(ctx context.Context, req *violinv1.FramesRequest, out *connect.ServerStream[violinv1.FramesResponse]) error {
	snap, err := s.catalog.Resolve(ctx, req.GetSnapshot())
	if err != nil {
		return apiError(err)
	}
	b, err := s.store.GetBlob(ctx, snap.Channel.Ref)
	if err != nil {
		return apiError(fmt.Errorf("channel state of snapshot %s: %w", snap.Ref(), err))
	}
	for r := bytes.NewBuffer(b); r.Len() > 0; {
		if err := out.Send(&violinv1.FramesResponse{Data: r.Next(messageSize)}); err != nil {
			return err
		}
	}
	return nil
}
