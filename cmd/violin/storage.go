package main

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/pflag"

	"violin/internal/server"
	"violin/internal/store"
)

const passphraseVariable = "VIOLIN_PASSPHRASE"

// storage is where the server's store lies, as the user gave it. It counts for the
// server that is started, not for one that runs.
type storage struct {
	url, passphraseFile, compression string
	insecure                         bool
}

func (s *storage) flags(flags *pflag.FlagSet) {
	flags.StringVar(&s.url, "store", os.Getenv("VIOLIN_STORE"), "`URL` of the store, such as s3://bucket?region=eu-west-1; for a server that is started (default store in\nthe state directory; env VIOLIN_STORE)")
	flags.StringVar(&s.passphraseFile, "passphrase-file", os.Getenv("VIOLIN_PASSPHRASE_FILE"), "`file` whose first line unlocks the store (env VIOLIN_PASSPHRASE_FILE, or VIOLIN_PASSPHRASE itself; by default\nthe key is in store.key in the state directory)")
	flags.StringVar(&s.compression, "compression", cmp.Or(os.Getenv("VIOLIN_COMPRESSION"), compressMinLZ), "of pages that a server stores: minlz; s2, which leaves an eighth less and takes twice as long;\nor zstd: a quarter less, nine times as long; for a server that is started (env VIOLIN_COMPRESSION)")
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
	if s.compression != compressMinLZ {
		args = append(args, "--compression", s.compression)
	}
	if s.insecure {
		args = append(args, "--insecure-no-encryption")
	}
	return args
}

// read is what the server needs. The passphrase leaves the environment, so that
// what the server starts does not inherit it.
func (s *storage) read() (server.Storage, error) {
	compression, err := s.pages()
	if err != nil {
		return server.Storage{}, err
	}
	passphrase := os.Getenv(passphraseVariable)
	if err := os.Unsetenv(passphraseVariable); err != nil {
		return server.Storage{}, err
	}
	if s.passphraseFile != "" {
		if passphrase, err = readPassphrase(s.passphraseFile); err != nil {
			return server.Storage{}, err
		}
	}
	return server.Storage{URL: s.url, Passphrase: passphrase, Insecure: s.insecure, Compression: compression}, nil
}

const compressMinLZ, compressS2, compressZstd = "minlz", "s2", "zstd"

func (s *storage) pages() (store.Compression, error) {
	switch s.compression {
	case compressMinLZ:
		return store.CompressFast, nil
	case compressS2:
		return store.CompressBalanced, nil
	case compressZstd:
		return store.CompressSmall, nil
	}
	return 0, &failure{code: exitUsage, err: fmt.Errorf("--compression %q, want %s, %s or %s", s.compression, compressMinLZ, compressS2, compressZstd)}
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
