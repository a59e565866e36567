package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	violinv1 "violin/api/violin/v1"
	"violin/internal/daemon"
)

// version is set by the build: -ldflags "-X main.version=v0.1.0".
var version string

// violinVersion is what the build was told, or else what Go knows of the sources.
func violinVersion() string {
	if version != "" {
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	return sourceVersion(info)
}

// sourceVersion names the module's version, or else the commit, of a build.
func sourceVersion(info *debug.BuildInfo) string {
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	var commit, dirty string
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			commit = s.Value[:min(12, len(s.Value))]
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = "+dirty"
		}
	}
	if commit == "" {
		return "devel"
	}
	return "devel-" + commit + dirty
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Tell the version of this program, and of the server if one runs",
		Long: `Tell the version of this program, and of the server if one runs. With --output json:
{"client": ..., "server": ...}, each as in the API; server is null if none runs.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.version(cmd.Context()) },
	}
}

func (a *app) version(ctx context.Context) error {
	ours := &violinv1.VersionResponse{
		Version: violinVersion(),
		Go:      fmt.Sprintf("%s %s/%s", runtime.Version(), runtime.GOOS, runtime.GOARCH),
		Pid:     int64(os.Getpid()),
	}
	theirs, err := a.serverVersion(ctx)
	if err != nil {
		return err
	}
	if a.output == "json" {
		return a.printVersions(ours, theirs)
	}
	fmt.Fprintf(a.out, "violin %s, %s\n", ours.GetVersion(), ours.GetGo())
	if theirs != nil {
		fmt.Fprintf(a.out, "server %s, %s, pid %d\n", theirs.GetVersion(), theirs.GetGo(), theirs.GetPid())
	}
	return nil
}

// serverVersion asks the server that runs; nil if none does.
func (a *app) serverVersion(ctx context.Context) (*violinv1.VersionResponse, error) {
	a.quiet = true // about versions that differ: they are printed
	c, err := a.findServer(ctx)
	if errors.Is(err, daemon.ErrNotRunning) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return c.Version(ctx, &violinv1.VersionRequest{})
}

func (a *app) printVersions(ours, theirs *violinv1.VersionResponse) error {
	document := struct {
		Client json.RawMessage  `json:"client"`
		Server *json.RawMessage `json:"server"`
	}{}
	raw, err := marshalJSON(ours)
	if err != nil {
		return err
	}
	document.Client = raw
	if theirs != nil {
		raw, err := marshalJSON(theirs)
		if err != nil {
			return err
		}
		document.Server = (*json.RawMessage)(&raw)
	}
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetIndent("", "  ")
	if err := encoder.Encode(document); err != nil {
		return err
	}
	_, err = a.out.Write(b.Bytes())
	return err
}
