//go:build !amd64

package pagehash

func vectors[H ~[Size]byte](out []H, pages []byte) { each(out, pages) }
