package host_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/host"
	"scoria/driver/host/objecttest"
	"scoria/driver/registry"
)

func benchStore(b *testing.B, pol alba.Policy, enc alba.Encryption) driver.Store {
	b.Helper()
	dir := b.TempDir()
	reg, err := registry.Open(filepath.Join(dir, "registry"))
	if err != nil {
		b.Fatal(err)
	}
	ps := albatest.Preset(pol)
	ps.FragmentBytes, ps.Encryption = alba.DefaultFragment, enc
	s, err := objecttest.Open(host.AlbaRegistry{Store: reg}, vfs.OS(), dir, pol.Shards(), ps)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = s.Close(); _ = reg.Close() })
	if err := s.CreateNamespace(b.Context(), "n"); err != nil {
		b.Fatal(err)
	}
	return s
}

// BenchmarkAlbaUpload stores 64 MiB objects. Its bound is BenchmarkDiskBound, with the
// same bytes on the same disk: (k+m)/k times the object.
func BenchmarkAlbaUpload(b *testing.B) {
	data := albatest.Pattern(1, 64<<20)
	for _, pol := range []alba.Policy{{K: 1, M: 0, C: 1, X: 1}, {K: 4, M: 2, C: 6, X: 1}, {K: 16, M: 4, C: 20, X: 1}} {
		b.Run(fmt.Sprintf("%d+%d", pol.K, pol.M), func(b *testing.B) {
			s := benchStore(b, pol, alba.EncryptNone)
			b.SetBytes(int64(len(data)))
			i := 0
			for b.Loop() {
				name := fmt.Sprint("o", i)
				i++
				if err := s.Put(b.Context(), "n", name, 1, driver.Object{Data: bytes.NewReader(data), Size: int64(len(data))}); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := s.Delete(b.Context(), "n", name, 1); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}

// BenchmarkDiskBound writes the bytes of an upload to files, as many at once, and
// syncs each.
func BenchmarkDiskBound(b *testing.B) {
	data := albatest.Pattern(1, 64<<20)
	for _, km := range [][2]int{{1, 0}, {4, 2}, {16, 4}} {
		b.Run(fmt.Sprintf("%d+%d", km[0], km[1]), func(b *testing.B) {
			dir := b.TempDir()
			shard := data[:len(data)/km[0]]
			b.SetBytes(int64(len(data)))
			for b.Loop() {
				errs := make(chan error, km[0]+km[1])
				for i := range km[0] + km[1] {
					go func() { errs <- writeSynced(filepath.Join(dir, fmt.Sprint(i)), shard) }()
				}
				for range km[0] + km[1] {
					if err := <-errs; err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}

func writeSynced(name string, p []byte) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(p); err != nil {
		return err
	}
	return f.Sync()
}

// BenchmarkAlbaRead4K reads 4 KiB at random places of 64 MiB. fetched/asked is the
// amplification of reads.
func BenchmarkAlbaRead4K(b *testing.B) {
	data := albatest.Pattern(1, 64<<20)
	for _, enc := range []alba.Encryption{alba.EncryptNone, alba.EncryptAES256GCM} {
		b.Run(enc.String(), func(b *testing.B) {
			s := benchStore(b, alba.Policy{K: 4, M: 2, C: 6, X: 1}, enc)
			if err := s.Put(b.Context(), "n", "o", 1, driver.Object{Data: bytes.NewReader(data), Size: int64(len(data))}); err != nil {
				b.Fatal(err)
			}
			p := make([]byte, 4096)
			rng := rand.New(rand.NewPCG(1, 2))
			b.SetBytes(4096)
			b.ReportAllocs()
			for b.Loop() {
				if err := s.ReadAt(b.Context(), "n", "o", p, rng.Int64N(16<<10)*4096); err != nil {
					b.Fatal(err)
				}
			}
			c := s.(host.AlbaStore).Proxy.Counters()
			b.ReportMetric(float64(c.FetchedBytes.Load())/float64(c.ReadBytes.Load()), "fetched/asked")
		})
	}
}
