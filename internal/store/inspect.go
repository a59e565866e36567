package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
)

// Info is what a store tells without a key.
type Info struct {
	Exists bool
	ID     string
	// Key is what unlocks it: "file", "passphrase", or empty if it is not encrypted.
	Key string
}

// Inspect tells whether there is a store, and what opening it takes. It changes
// nothing.
func Inspect(ctx context.Context, at string) (info Info, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("look at store %s: %w", at, err)
		}
	}()
	b, err := openBucket(ctx, at, false)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return Info{}, nil
		}
		return Info{}, err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	raw, err := b.read(ctx, describeName, maxDescription)
	if errors.Is(err, ErrMissing) {
		if ok, err := b.IsAccessible(ctx); err != nil || !ok {
			return Info{}, errors.Join(errors.New("no such bucket; make it first, and compare name, region and endpoint"), err)
		}
		return Info{}, nil
	}
	if err != nil {
		return Info{}, err
	}
	var d description
	if err := json.Unmarshal(raw, &d); err != nil {
		return Info{}, fmt.Errorf("%s: %w: %w", describeName, ErrDamaged, err)
	}
	info = Info{Exists: true, ID: d.ID}
	if d.Key != nil {
		info.Key = d.Key.From
	}
	return info, nil
}
