package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"
	_ "gocloud.dev/blob/s3blob" // s3:// as a store's URL
	"google.golang.org/protobuf/types/known/durationpb"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/access"
	"violin/internal/catalog"
	"violin/internal/metadata"
	"violin/internal/priority"
	"violin/internal/store"
)

var _ violinv1connect.StoreServiceHandler = (*Server)(nil)

// Storage says where the store lies and what unlocks it.
type Storage struct {
	URL        string // such as s3://bucket?region=...; empty: the directory store below the state directory
	Passphrase string // unlocks the store; empty: the key file store.key below the state directory does
	Insecure   bool   // a store that is made is not encrypted
	// Compression is that of pages which are stored from now on.
	Compression store.Compression
}

func (c *Config) location() string {
	if c.Storage.URL != "" {
		return c.Storage.URL
	}
	return filepath.Join(c.StateDir, "store")
}

func (c *Config) keyFile() string { return filepath.Join(c.StateDir, "store.key") }

// openStore opens the store, or makes it: encrypted, unless the contrary was asked for.
// Its documents are where led says, and what was beside its pages is taken in.
func openStore(ctx context.Context, c *Config, led *metadata.Leadership) (*store.Store, error) {
	key, err := storeKey(ctx, c)
	if err != nil {
		return nil, err
	}
	st, err := store.Open(ctx, c.location(), store.Options{
		Documents: led, Copied: copied(), Guard: led.Check,
		Compression: c.Storage.Compression,
		Logger:      c.Logger, Key: key, StartWorker: func() { priority.Background(c.Logger) },
	})
	if err != nil {
		return nil, err
	}
	if err := bind(ctx, c, st, led); err != nil {
		return nil, errors.Join(err, st.Close())
	}
	return st, nil
}

// copied are the directories of documents that the store has copies of.
func copied() []string { return append(catalog.Directories(), authorityDir) }

func bind(ctx context.Context, c *Config, st *store.Store, led *metadata.Leadership) error {
	begun := false
	take := func(ctx context.Context) error {
		begun = true
		taken, err := st.Reconcile(ctx, catalog.Sealed)
		if len(taken) > 0 {
			c.Logger.Info("documents were taken into etcd from the store", "documents", len(taken), "first", taken[0], "last", taken[len(taken)-1])
		}
		return err
	}
	terms := catalog.New(st)
	known, etcd, err := terms.CopiedTerm(ctx)
	if err == nil {
		err = c.home(etcd)
	}
	if err != nil {
		return err
	}
	if err := led.Bind(ctx, st.ID(), known, take); err != nil {
		return err
	}
	if !begun {
		if err := take(ctx); err != nil {
			return err
		}
	}
	return terms.PutTerm(ctx, led.Term(), c.Etcd.Endpoints)
}

// storeKey finds the key of the store that there is, or chooses that of one to be made.
func storeKey(ctx context.Context, c *Config) (store.Key, error) {
	info, err := store.Inspect(ctx, c.location())
	if err != nil {
		return store.Key{}, err
	}
	wrong := func(format string, args ...any) (store.Key, error) {
		return store.Key{}, fmt.Errorf("store %s: %w: %s", c.location(), store.ErrKey, fmt.Sprintf(format, args...))
	}
	passphrase := c.Storage.Passphrase != ""
	switch {
	case !info.Exists && c.Storage.Insecure && passphrase:
		return wrong("both a passphrase and no encryption are asked for; choose one")
	case !info.Exists && c.Storage.Insecure:
		c.Logger.Warn("the store is made without encryption: whoever can read it reads the memory of all nodes", "store", c.location())
		return store.Key{}, nil
	case info.Exists && info.Key == "":
		if passphrase {
			return wrong("it was made without encryption, but a passphrase was given; leave it out, or use another store")
		}
		c.Logger.Warn("the store is not encrypted", "store", c.location())
		return store.Key{}, nil
	case info.Exists && info.Key == "passphrase" && !passphrase:
		return wrong("it was made with a passphrase; give it by VIOLIN_PASSPHRASE or --passphrase-file")
	case info.Exists && info.Key == "file" && passphrase:
		return wrong("it was made with the key file %s; leave the passphrase out", c.keyFile())
	case passphrase:
		return store.Passphrase(c.Storage.Passphrase)
	}
	key, err := store.ReadKeyFile(c.keyFile())
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	if info.Exists {
		return wrong("its key file %s is missing; bring it back from where you keep a copy: without it, no snapshot can be read", c.keyFile())
	}
	if err := os.MkdirAll(c.StateDir, 0o700); err != nil {
		return key, err
	}
	key = store.NewKey()
	if err := key.WriteFile(c.keyFile()); err != nil {
		return key, err
	}
	c.Logger.Info("the store is encrypted; keep a copy of its key file", "store", c.location(), "key", c.keyFile())
	return key, nil
}

// Stats implements the API.
func (s *Server) Stats(ctx context.Context, _ *violinv1.StatsRequest) (*violinv1.StatsResponse, error) {
	all, err := s.catalog.List(ctx, "")
	if err != nil {
		return nil, apiError(err)
	}
	all = s.owned(ctx, all)
	resp := &violinv1.StatsResponse{Id: s.store.ID(), Encrypted: s.store.Encrypted(), Snapshots: uint64(len(all))}
	if access.From(ctx).Operator() {
		st := s.store.Stats()
		resp.Location = s.cfg.location()
		resp.Packs, resp.PackBytes, resp.Pages, resp.PageBytes = uint64(st.Packs), uint64(st.PackBytes), uint64(st.Pages), uint64(st.PageBytes)
		resp.Chunks, resp.IndexBytes, resp.UnreadPacks = uint64(st.Chunks), uint64(st.IndexBytes), uint64(st.UnreadPacks)
	}
	named := map[string]bool{}
	for _, snap := range all {
		named[snap.Slice] = true
		for _, n := range snap.Nodes {
			resp.MemoryBytes += uint64(n.Pages+n.ZeroPages) * store.PageSize
		}
	}
	resp.Slices = uint64(len(named))
	return resp, nil
}

// Check implements the API.
func (s *Server) Check(ctx context.Context, req *violinv1.CheckRequest, out *connect.ServerStream[violinv1.CheckResponse]) error {
	tell := serialize(func(p *violinv1.Progress) error {
		return out.Send(&violinv1.CheckResponse{Event: &violinv1.CheckResponse_Progress{Progress: p}})
	})
	report := &violinv1.CheckReport{ReadData: req.GetReadData()}
	// Copies of documents that are not what the documents are, are made again.
	if _, err := s.store.Reconcile(ctx); err != nil {
		return apiError(err)
	}
	roots := s.catalog.Audit(ctx, func(ref string, err error) {
		report.Damage = append(report.Damage, &violinv1.Damage{Message: err.Error(), NeededBy: []string{ref}})
	})
	r, err := s.store.Check(ctx, roots, store.CheckOptions{
		ReadData: req.GetReadData(),
		Progress: func(done, total int) {
			if done == total || done%16 == 0 {
				tell("check", "", fmt.Sprintf("%d of %d packs", done, total))
			}
		},
	})
	if err != nil {
		return apiError(err)
	}
	report.Packs, report.Pages, report.Chunks, report.Bytes = uint64(r.Packs), uint64(r.Pages), uint64(r.Chunks), uint64(r.Bytes)
	for _, p := range r.Problems {
		report.Damage = append(report.Damage, damageMessage(p))
	}
	return out.Send(&violinv1.CheckResponse{Event: &violinv1.CheckResponse_Report{Report: report}})
}

func damageMessage(p store.Problem) *violinv1.Damage {
	d := &violinv1.Damage{Message: p.Err.Error(), NeededBy: p.Roots}
	var e *store.Error
	if errors.As(p.Err, &e) {
		d.Pack = e.Pack
		if !e.Hash.IsZero() {
			d.Page = e.Hash.String()
		}
		if e.Offset >= 0 {
			d.Offset = &e.Offset
		}
	}
	return d
}

// Collect implements the API.
func (s *Server) Collect(ctx context.Context, _ *violinv1.CollectRequest) (*violinv1.CollectResponse, error) {
	began := time.Now()
	st, err := s.store.GC(ctx, s.catalog.Roots(ctx))
	if err != nil {
		return nil, apiError(err)
	}
	return &violinv1.CollectResponse{
		PacksDeleted: uint64(st.PacksDeleted), PacksRewritten: uint64(st.PacksRewritten), PacksInUse: uint64(st.PacksInUse),
		BytesFreed: st.BytesFreed, BytesKept: uint64(st.BytesKept), Duration: durationpb.New(time.Since(began)),
	}, nil
}

// sound reads everything of a snapshot once, so that one that is damaged is
// refused while what runs of its slice still runs.
func (s *Server) sound(ctx context.Context, snap *catalog.Snapshot) error {
	if err := s.store.Verify(ctx, snap.Roots()); err != nil {
		return fmt.Errorf("snapshot %s cannot be restored, and nothing was changed: %w", snap.Ref(), err)
	}
	return nil
}

// Forget implements the API.
func (s *Server) Forget(ctx context.Context, req *violinv1.ForgetRequest) (*violinv1.ForgetResponse, error) {
	verdicts, err := s.judge(ctx, req)
	if err != nil {
		return nil, apiError(err)
	}
	resp := &violinv1.ForgetResponse{DryRun: req.GetDryRun()}
	names := map[string]bool{}
	for _, v := range verdicts {
		names[v.Snapshot.Slice] = true
		if !v.Kept() && !req.GetDryRun() {
			if err := s.catalog.Delete(ctx, v.Snapshot.Slice, v.Snapshot.ID); err != nil {
				return nil, apiError(err)
			}
		}
		m := &violinv1.Verdict{Snapshot: snapshotMessage(v.Snapshot), Kept: v.Kept(), Reasons: v.Reasons}
		switch {
		case v.Kept():
		case req.GetSlice() == "":
			m.Reasons = []string{"named"}
		default:
			m.Reasons = []string{"no rule keeps it"}
		}
		resp.Verdicts = append(resp.Verdicts, m)
	}
	if !req.GetDryRun() {
		for name := range names {
			s.freeName(ctx, name)
		}
	}
	return resp, nil
}

// needed says why a snapshot cannot be forgotten now; it is empty if it can.
func (s *Server) needed(snap *catalog.Snapshot) string {
	if at := s.suspension(snap.Slice); at != nil && at.Snapshot == snap.ID {
		return "the suspended slice goes on from it"
	}
	if p := s.protection(snap.Slice); p != nil && p.Head == snap.Ref() {
		return "the protected slice would be rolled back to it"
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.followed[snap.Ref()] > 0 {
		return "its memory still follows to nodes that run"
	}
	for name, sl := range s.slices {
		if sl != nil && sl.waitsAt(snap.Ref()) {
			return fmt.Sprintf("slice %q is paused at it", name)
		}
	}
	return ""
}

// judge says which snapshots a request keeps.
func (s *Server) judge(ctx context.Context, req *violinv1.ForgetRequest) ([]catalog.Verdict, error) {
	invalid := func(err error) ([]catalog.Verdict, error) {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	policy := catalog.Policy{
		Last: int(req.GetKeepLast()), Hourly: int(req.GetKeepHourly()), Daily: int(req.GetKeepDaily()), Tags: req.GetKeepTags(),
	}
	if (req.GetSlice() == "") == (len(req.GetSnapshots()) == 0) {
		return invalid(errors.New("name either snapshots or a slice and what to keep of it"))
	}
	if req.GetSlice() != "" {
		if err := catalog.CheckName(req.GetSlice()); err != nil {
			return invalid(err)
		}
		all, err := s.catalog.List(ctx, req.GetSlice())
		if err != nil {
			return nil, err
		}
		if len(all) == 0 {
			return nil, fmt.Errorf("slice %q: %w", req.GetSlice(), catalog.ErrNotFound)
		}
		verdicts, err := policy.Judge(all)
		if err != nil {
			return invalid(err)
		}
		for i, v := range verdicts {
			if why := s.needed(v.Snapshot); why != "" {
				verdicts[i].Reasons = append(v.Reasons, why)
			}
		}
		return verdicts, nil
	}
	// All are found before one goes.
	var verdicts []catalog.Verdict
	seen := map[string]bool{}
	for _, ref := range req.GetSnapshots() {
		snap, err := s.catalog.Resolve(ctx, ref)
		if slice, id, _ := strings.Cut(ref, "@"); errors.Is(err, store.ErrDamaged) && slice != "" {
			// A document that cannot be read can be forgotten all the same, by its whole name.
			if found, eerr := s.catalog.Exists(ctx, slice, id); eerr == nil && found {
				snap, err = &catalog.Snapshot{Slice: slice, ID: id}, nil
			}
		}
		if err != nil {
			return nil, err
		}
		if why := s.needed(snap); why != "" {
			return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("forget snapshot %s: %s", snap.Ref(), why))
		}
		if !seen[snap.Ref()] {
			verdicts = append(verdicts, catalog.Verdict{Snapshot: snap})
			seen[snap.Ref()] = true
		}
	}
	return verdicts, nil
}
