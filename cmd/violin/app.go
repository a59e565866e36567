package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"violin/api/violin/v1/violinv1connect"
	"violin/internal/daemon"
	"violin/internal/server"
)

// stdio is where a command reads and writes. What is not an *os.File is no terminal.
type stdio struct {
	in       io.Reader
	out, err io.Writer
}

// terminal returns the file behind a reader or writer if that is a terminal.
func terminal(stream any) (*os.File, bool) {
	f, ok := stream.(*os.File)
	return f, ok && term.IsTerminal(int(f.Fd()))
}

// app is one run of the command line.
type app struct {
	stdio
	location *time.Location // of the times printed

	runDir, stateDir string
	output           string
	quiet            bool
	storage          storage

	serverAddress string // as the user gave it; see [app.remote]
	flags         *pflag.FlagSet

	connection *http.Client // to the server, once there is one
	base       string       // what the API's paths are appended to

	// started is set once arguments and flags are accepted: an error before is one of usage.
	started bool
}

const rootLong = `Violin takes live, consistent snapshots of a whole virtual network: the memory
and devices of every VM and every frame in flight between them, across hosts and
sites, while the workload inside keeps running. A snapshot is restored with
everything in the middle of what it did.

A slice is one running experiment: nodes (VMs) and the networks between them,
described by a topology file. 'violin up' starts one; what runs them is a server
in the background of this machine, started when needed and gone with the last slice,
or a server elsewhere that 'violin login' gives access to.

Results go to stdout, progress and errors to stderr.

Exit status:
    0  it is done
    1  it failed
    2  wrong usage, or a mistake in the input (a topology, a name)
    3  no such slice, node or snapshot
    4  the cut was aborted: the nodes run on, and there is no new snapshot
    5  the state forbids it now (a cut runs already, a name is taken, it does not fit)
    6  the server could not be started or reached, or went away
    7  not logged in, or it takes an operator
  130  interrupted (Ctrl-C)
'violin exec' ends with the status of the program it ran, and with 125 if none ran.`

// run is the whole command: arguments in, exit status out.
func (a *app) run(ctx context.Context, args []string) int {
	root := a.root()
	root.SetArgs(args)
	defer a.disconnect()
	verb, err := root.ExecuteContextC(ctx)
	return a.finish(ctx, verb, err)
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:               "violin",
		Short:             "Live, consistent snapshots of whole virtual networks",
		Long:              rootLong,
		SilenceErrors:     true,
		SilenceUsage:      true,
		PersistentPreRunE: func(*cobra.Command, []string) error { return a.accept() },
	}
	root.SetIn(a.in)
	root.SetOut(a.out)
	root.SetErr(a.err)
	flags := root.PersistentFlags()
	a.flags = flags
	flags.StringVarP(&a.output, "output", "o", "table", "what to print: `table`, or json (the API's messages, one document)")
	flags.BoolVarP(&a.quiet, "quiet", "q", false, "no progress and no notes on stderr")
	flags.StringVar(&a.serverAddress, "server", os.Getenv("VIOLIN_SERVER"), "the `server` to speak to, HOST:PORT, or local for this machine's (env VIOLIN_SERVER; otherwise that of the last login)")
	flags.StringVar(&a.runDir, "run-dir", envOr("VIOLIN_RUN_DIR", daemon.DefaultRunDir), "`directory` of the server's socket (env VIOLIN_RUN_DIR)")
	flags.StringVar(&a.stateDir, "state-dir", envOr("VIOLIN_STATE_DIR", daemon.DefaultStateDir), "`directory` of snapshots, images and the server's log (env VIOLIN_STATE_DIR)")
	a.storage.flags(flags)
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp))
	root.AddCommand(
		a.upCommand(), a.psCommand(), a.downCommand(),
		a.snapshotCommand(), a.snapshotsCommand(), a.restoreCommand(), a.logCommand(), a.tagCommand(),
		a.verifyCommand(), a.framesCommand(), a.forgetCommand(),
		a.suspendCommand(), a.resumeCommand(), a.forkCommand(), a.replayCommand(), a.continueCommand(),
		a.protectCommand(), a.unprotectCommand(), a.eventsCommand(),
		a.exportCommand(), a.importCommand(), a.storeCommand(), a.imageCommand(), a.benchCommand(),
		a.consoleCommand(), a.execCommand(),
		a.serverCommand(), a.agentCommand(), a.keepCommand(), a.tokenCommand(), a.hostsCommand(),
		a.loginCommand(), a.logoutCommand(), a.whoamiCommand(), a.usersCommand(), a.giveCommand(), a.versionCommand(),
	)
	return root
}

func envOr(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

// accept is called when cobra has accepted the arguments, before the verb runs.
func (a *app) accept() error {
	if a.output != "table" && a.output != "json" {
		return fmt.Errorf("--output %q: it is table or json", a.output)
	}
	a.started = true
	return nil
}

// tableOnly refuses --output json for a verb that has no result of its own.
func (a *app) tableOnly(cmd *cobra.Command) error {
	if a.output != "table" {
		return &failure{code: exitUsage, err: fmt.Errorf("%s has no result to print as %s", cmd.Name(), a.output)}
	}
	return nil
}

// dirs are the server's directories as the user gave them.
func (a *app) dirs() (daemon.Dirs, error) {
	d, err := daemon.NewDirs(a.runDir, a.stateDir)
	if err != nil {
		return daemon.Dirs{}, &failure{code: exitUsage, err: err}
	}
	return d, nil
}

// startServer connects to the server and starts one if none runs.
func (a *app) startServer(ctx context.Context, p *progress) (violinv1connect.SliceServiceClient, error) {
	if c, err := a.dialRemote(ctx); c != nil || err != nil {
		return c, err
	}
	dirs, err := a.dirs()
	if err != nil {
		return nil, err
	}
	executable, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program to start it as the server: %w", err)
	}
	theirs, err := daemon.Probe(ctx, dirs)
	if err != nil {
		p.step("server", "", "starting it in the background")
		theirs, _, err = daemon.Ensure(ctx, dirs, append([]string{executable, "server",
			"--run-dir", dirs.Run, "--state-dir", dirs.State, "--idle-exit", daemon.DefaultIdleExit.String()}, a.storage.args()...))
	}
	if err != nil {
		return nil, unreachable(err)
	}
	a.compareVersions(theirs)
	return a.connect(dirs), nil
}

// findServer connects to the server if one runs; otherwise the error is [daemon.ErrNotRunning].
func (a *app) findServer(ctx context.Context) (violinv1connect.SliceServiceClient, error) {
	if c, err := a.dialRemote(ctx); c != nil || err != nil {
		return c, err
	}
	dirs, err := a.dirs()
	if err != nil {
		return nil, err
	}
	theirs, err := daemon.Probe(ctx, dirs)
	// A server that was killed just now takes a call and breaks it off, until it is gone.
	for n := 0; n < dyingProbes && errors.Is(err, syscall.ECONNRESET) && ctx.Err() == nil; n++ {
		time.Sleep(dyingPause)
		theirs, err = daemon.Probe(ctx, dirs)
	}
	switch {
	case errors.Is(err, daemon.ErrNotRunning):
		return nil, err
	case err != nil:
		return nil, unreachable(err)
	}
	a.compareVersions(theirs)
	return a.connect(dirs), nil
}

// How often, and how long after each other, a server that breaks calls off is asked
// again.
const (
	dyingProbes = 20
	dyingPause  = 50 * time.Millisecond
)

// findSliceServer is findServer for a verb about a slice that runs: no server, no such slice.
func (a *app) findSliceServer(ctx context.Context, slice string) (violinv1connect.SliceServiceClient, error) {
	c, err := a.findServer(ctx)
	if dirs, derr := a.dirs(); derr == nil && errors.Is(err, daemon.ErrNotRunning) && server.Remembers(dirs.State) {
		p := a.progress()
		defer p.done()
		return a.startServer(ctx, p) // which knows whether this slice is a suspended one
	}
	if errors.Is(err, daemon.ErrNotRunning) {
		return nil, &failure{code: exitNotFound, err: fmt.Errorf("slice %q does not run: %w", slice, err),
			hint: fmt.Sprintf("'violin up FILE' starts a slice; 'violin restore %s@latest' brings its last snapshot back.", slice)}
	}
	return c, err
}

func (a *app) connect(dirs daemon.Dirs) violinv1connect.SliceServiceClient {
	if a.connection == nil {
		a.connection, a.base = daemon.Client(dirs), daemon.BaseURL
	}
	return violinv1connect.NewSliceServiceClient(a.connection, a.base)
}

// start connects to one of the server's services, and starts a server if none runs.
func start[C any](ctx context.Context, a *app, p *progress, service func(connect.HTTPClient, string, ...connect.ClientOption) C) (C, error) {
	if _, err := a.startServer(ctx, p); err != nil {
		var none C
		return none, err
	}
	return service(a.connection, a.base), nil
}

// find connects to one of the services of a server that others can reach, and starts
// none.
func find[C any](ctx context.Context, a *app, service func(connect.HTTPClient, string, ...connect.ClientOption) C) (C, error) {
	if _, err := a.findServer(ctx); err != nil {
		var none C
		if errors.Is(err, daemon.ErrNotRunning) {
			return none, unreachable(fmt.Errorf("%w; 'violin server --listen ADDRESS:PORT' starts one that takes hosts and users in", err))
		}
		return none, err
	}
	return service(a.connection, a.base), nil
}

func (a *app) disconnect() {
	if a.connection != nil {
		a.connection.CloseIdleConnections()
	}
}

// compareVersions warns of a server that was started by another violin than this.
func (a *app) compareVersions(theirs string) {
	if ours := violinVersion(); theirs != ours {
		a.note("the server that runs is violin %s, this is %s: 'violin down --all' lets it leave, and the next command starts this one", theirs, ours)
	}
}

// note tells the user something that is neither result nor error.
func (a *app) note(format string, args ...any) {
	if !a.quiet {
		fmt.Fprintf(a.err, "violin: "+format+"\n", args...)
	}
}

// print writes a result: the message for programs, or what table makes of it for people.
func (a *app) print(message proto.Message, table func(io.Writer)) error {
	var b bytes.Buffer
	if a.output == "json" {
		document, err := marshalJSON(message)
		if err != nil {
			return err
		}
		b.Write(document)
	} else {
		table(&b)
	}
	_, err := a.out.Write(b.Bytes())
	return err
}

// marshalLine is marshalJSON for one of many: it is a line.
func marshalLine(message proto.Message) ([]byte, error) {
	document, err := marshalJSON(message)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := json.Compact(&b, document); err != nil {
		return nil, err
	}
	b.WriteByte('\n')
	return b.Bytes(), nil
}

// marshalJSON renders a message as the API's JSON does, with every field there, so
// that a program need not know which are left out when zero.
func marshalJSON(message proto.Message) ([]byte, error) {
	raw, err := protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(message)
	if err != nil {
		return nil, fmt.Errorf("render %s as JSON: %w", message.ProtoReflect().Descriptor().FullName(), err)
	}
	// protojson varies its white space on purpose; what users diff should not.
	var b bytes.Buffer
	if err := json.Indent(&b, raw, "", "  "); err != nil {
		return nil, err
	}
	b.WriteByte('\n')
	return b.Bytes(), nil
}
