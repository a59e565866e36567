package pagehash

import "golang.org/x/sys/cpu"

func processor() map[string]func([][Size]byte, []byte) {
	all := map[string]func([][Size]byte, []byte){}
	if cpu.X86.HasAVX512F {
		all["avx512"] = func(out [][Size]byte, pages []byte) { lanes(16, out, pages) }
	}
	if cpu.X86.HasAVX2 {
		all["avx2"] = func(out [][Size]byte, pages []byte) { lanes(8, out, pages) }
	}
	return all
}
