package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"violin/internal/events"
	"violin/internal/store"
	"violin/internal/trust"
)

// Directories of documents that are not the catalog's.
const (
	authorityDir = "ca"
	eventsDir    = "events"
)

// shelf is a directory of the store's documents: what others than the catalog keep there.
// How long a call takes is bounded by where the documents are.
type shelf struct {
	st  *store.Store
	dir string
}

var (
	_ trust.Vault     = shelf{}
	_ events.Segments = segments{}
)

// Read implements [trust.Vault] and [events.Segments].
func (s shelf) Read(name string) ([]byte, error) {
	data, err := s.st.GetDocument(context.Background(), s.dir+"/"+name)
	if errors.Is(err, store.ErrMissing) {
		err = fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	}
	return data, err
}

// Write implements [trust.Vault] and [events.Segments].
func (s shelf) Write(name string, data []byte) error {
	return s.st.ReplaceDocument(context.Background(), s.dir+"/"+name, data)
}

// Names implements [trust.Vault].
func (s shelf) Names(dir string) ([]string, error) { return s.names(s.dir + "/" + dir) }

func (s shelf) names(at string) (names []string, err error) {
	for name, err := range s.st.Documents(context.Background(), at) {
		if err != nil {
			return nil, err
		}
		names = append(names, strings.TrimPrefix(name, at+"/"))
	}
	return names, nil
}

// segments is a shelf for the log of events.
type segments struct{ shelf }

// Names implements [events.Segments].
func (s segments) Names() ([]string, error) { return s.names(s.dir) }

// Remove implements [events.Segments].
func (s segments) Remove(name string) error {
	return s.st.DeleteDocument(context.Background(), s.dir+"/"+name)
}

// openEvents opens the log of events, and takes in that of an earlier version.
func (s *Server) openEvents() (*events.Log, error) {
	log, err := events.Open(segments{shelf{s.store, eventsDir}})
	if err != nil {
		return nil, err
	}
	path := filepath.Join(s.cfg.StateDir, "events.jsonl")
	old, err := events.ReadFiles(path+".1", path)
	if err == nil && len(old) > 0 {
		if err = log.Begin(old); err == nil {
			err = errors.Join(setAside(path+".1"), setAside(path))
		}
	}
	return log, err
}

// openAuthority opens the certificate authority, and takes in that of an earlier version.
func (s *Server) openAuthority() (*trust.Authority, error) {
	vault := shelf{s.store, authorityDir}
	path := filepath.Join(s.cfg.StateDir, "ca")
	moved, err := trust.Move(trust.Directory(path), vault)
	if err == nil && moved {
		s.log.Info("the certificate authority is in etcd now, sealed; the directory that it was in may be deleted", "directory", path+aside)
		err = setAside(path)
	}
	if err != nil {
		return nil, err
	}
	return trust.OpenAuthority(vault)
}

// aside is added to the name of what was taken in.
const aside = ".imported"

func setAside(path string) error {
	err := os.Rename(path, path+aside)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
