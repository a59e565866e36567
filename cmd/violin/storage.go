package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/pflag"

	"violin/internal/server"
)

const passphraseVariable = "VIOLIN_PASSPHRASE"

// storage is where the server's store lies, as the user gave it. It counts for the
// server that is started, not for one that runs.
type storage struct {
	url, passphraseFile string
	insecure            bool
}

func (s *storage) flags(flags *pflag.FlagSet) {
	flags.StringVar(&s.url, "store", os.Getenv("VIOLIN_STORE"), "`URL` of the store, such as s3://bucket?region=eu-west-1; for a server that is started (default store in\nthe state directory; env VIOLIN_STORE)")
	flags.StringVar(&s.passphraseFile, "passphrase-file", os.Getenv("VIOLIN_PASSPHRASE_FILE"), "`file` whose first line unlocks the store (env VIOLIN_PASSPHRASE_FILE, or VIOLIN_PASSPHRASE itself; by default\nthe key is in store.key in the state directory)")
	flags.BoolVar(&s.insecure, "insecure-no-encryption", os.Getenv("VIOLIN_INSECURE_NO_ENCRYPTION") == "1", "a store that is made now is not encrypted (env VIOLIN_INSECURE_NO_ENCRYPTION=1)")
}

// args hands the flags on to a server that is started; the passphrase itself is in its environment.
func (s *storage) args() []string {
	var args []string
	if s.url != "" {
		args = append(args, "--store", s.url)
	}
	if s.passphraseFile != "" {
		file, err := filepath.Abs(s.passphraseFile) // the server works elsewhere
		if err != nil {
			file = s.passphraseFile
		}
		args = append(args, "--passphrase-file", file)
	}
	if s.insecure {
		args = append(args, "--insecure-no-encryption")
	}
	return args
}

// read is what the server needs. The passphrase leaves the environment, so that
// what the server starts does not inherit it.
func (s *storage) read() (server.Storage, error) {
	passphrase := os.Getenv(passphraseVariable)
	if err := os.Unsetenv(passphraseVariable); err != nil {
		return server.Storage{}, err
	}
	if s.passphraseFile != "" {
		var err error
		if passphrase, err = readPassphrase(s.passphraseFile); err != nil {
			return server.Storage{}, err
		}
	}
	return server.Storage{URL: s.url, Passphrase: passphrase, Insecure: s.insecure}, nil
}

// readPassphrase reads the first line of a file.
func readPassphrase(file string) (string, error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return "", &failure{code: exitUsage, err: fmt.Errorf("read the passphrase: %w", err)}
	}
	line, _, _ := strings.Cut(string(raw), "\n")
	if line = strings.TrimSuffix(line, "\r"); line == "" {
		return "", &failure{code: exitUsage, err: fmt.Errorf("read the passphrase: the first line of %s is empty", file)}
	}
	return line, nil
}
