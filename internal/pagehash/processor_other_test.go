//go:build !amd64

package pagehash

func processor() map[string]func([][Size]byte, []byte) { return nil }

func processorLong() map[string]func([]byte) [Size]byte { return map[string]func([]byte) [Size]byte{} }
