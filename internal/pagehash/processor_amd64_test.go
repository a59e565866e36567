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

func processorLong() map[string]func([]byte) [Size]byte {
	all := map[string]func([]byte) [Size]byte{}
	lanes := func(n int) func([]byte) [Size]byte {
		return func(data []byte) [Size]byte {
			if len(data) <= 2*chunkSize {
				return SumLong(data)
			}
			return long(n, data)
		}
	}
	if cpu.X86.HasAVX512F {
		all["avx512"] = lanes(16)
	}
	if cpu.X86.HasAVX2 {
		all["avx2"] = lanes(8)
	}
	return all
}
