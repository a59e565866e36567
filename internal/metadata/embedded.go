package metadata

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"
)

const (
	// A single member votes for itself: it need not wait for others.
	tick     = 10 * time.Millisecond
	election = 50 * time.Millisecond
	// quota bounds etcd's data, in bytes.
	quota = 4 << 30
	// kept is how many revisions of what was changed are kept. Nobody asks for old ones
	// but a read of a document in parts, at the revision that it began with.
	kept = "1000"
	// startBound is how long it may take to be ready: with a long log on a slow disk.
	startBound = time.Minute
)

// etcd allocates its log in pieces of 64 MB, two of them. What there is to write here
// needs much less, and this variable is the only way to say so.
func init() { wal.SegmentSizeBytes = 8 << 20 }

// embedded is an etcd of one member in this process. It listens nowhere.
type embedded struct {
	etcd *embed.Etcd
	lock *os.File
	shut sync.Once

	mu     sync.Mutex
	failed error // why it has stopped, if it did
}

func startEmbedded(ctx context.Context, cfg Config) (*embedded, error) {
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, err
	}
	// etcd itself would wait for whoever has its files.
	lock, err := os.OpenFile(filepath.Join(cfg.Dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		err = fmt.Errorf("lock %s: %w; another violin server uses this state directory: `violin version` names its pid", lock.Name(), err)
		return nil, errors.Join(err, lock.Close())
	}
	e := &embedded{lock: lock}
	c := embed.NewConfig()
	c.Name, c.Dir = "violin", cfg.Dir
	c.ListenClientUrls, c.AdvertiseClientUrls, c.ListenPeerUrls = nil, nil, nil
	// It has to be called something as a peer. Nothing listens there, and nobody asks.
	self := url.URL{Scheme: "http", Host: "localhost:2380"}
	c.AdvertisePeerUrls = []url.URL{self}
	c.InitialCluster = c.Name + "=" + self.String()
	c.TickMs, c.ElectionMs = uint(tick.Milliseconds()), uint(election.Milliseconds())
	c.QuotaBackendBytes = quota
	c.AutoCompactionMode, c.AutoCompactionRetention = embed.CompactorModeRevision, kept
	// Such as a full disk: it must not take the VMs along, whose parent this process is.
	c.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.New(&logCore{log: cfg.Logger, failed: e.fail},
		zap.WithFatalHook(zapcore.WriteThenGoexit), zap.WithPanicHook(zapcore.WriteThenGoexit)))
	if e.etcd, err = embed.StartEtcd(c); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	ctx, cancel := context.WithTimeout(ctx, startBound)
	defer cancel()
	select {
	case <-e.etcd.Server.ReadyNotify():
		return e, nil
	case <-e.etcd.Server.StopNotify():
		err = errors.New("it stopped")
	case <-ctx.Done():
		err = ctx.Err()
	}
	if cause := e.failure(); cause != nil {
		err = cause
	}
	e.close()
	return nil, err
}

func (e *embedded) client() *clientv3.Client { return v3client.New(e.etcd.Server) }

func (e *embedded) close() {
	e.shut.Do(func() {
		if e.failure() == nil { // else it would wait for what has ended
			e.etcd.Close()
		}
		_ = e.lock.Close()
	})
}

func (e *embedded) fail(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.failed == nil {
		e.failed = err
	}
}

func (e *embedded) failure() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.failed
}

// logCore hands etcd's log on. What is daily business to it is of interest to who looks
// for a fault only.
type logCore struct {
	log    *slog.Logger
	fields []zapcore.Field
	failed func(error) // told of what ends it
}

// Enabled implements [zapcore.Core].
func (l *logCore) Enabled(level zapcore.Level) bool {
	return level > zapcore.DebugLevel && l.log.Enabled(context.Background(), slogLevel(level))
}

func slogLevel(level zapcore.Level) slog.Level {
	switch {
	case level >= zapcore.ErrorLevel:
		return slog.LevelError
	case level == zapcore.WarnLevel:
		return slog.LevelWarn
	}
	return slog.LevelDebug
}

// With implements [zapcore.Core].
func (l *logCore) With(fields []zapcore.Field) zapcore.Core {
	next := *l
	next.fields = append(append([]zapcore.Field(nil), l.fields...), fields...)
	return &next
}

// Check implements [zapcore.Core]. What ends etcd is looked at whatever is logged.
func (l *logCore) Check(e zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if l.Enabled(e.Level) || e.Level >= zapcore.DPanicLevel {
		return checked.AddCore(e, l)
	}
	return checked
}

// Write implements [zapcore.Core].
func (l *logCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range append(append([]zapcore.Field(nil), l.fields...), fields...) {
		f.AddTo(enc)
	}
	var args []any
	for k, v := range enc.Fields {
		args = append(args, k, v)
	}
	if e.Level >= zapcore.DPanicLevel {
		err := errors.New(e.Message)
		if cause, ok := enc.Fields["error"]; ok {
			err = fmt.Errorf("%s: %v", e.Message, cause)
		}
		l.failed(err)
	}
	l.log.Log(context.Background(), slogLevel(e.Level), "etcd: "+e.Message, args...)
	return nil
}

// Sync implements [zapcore.Core].
func (l *logCore) Sync() error { return nil }
