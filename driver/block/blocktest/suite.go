package blocktest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"math/rand/v2"
	"os"
	"runtime"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"scoria/driver/block"
)

// MinSize is the least size, in bytes, of a device under Run.
const MinSize = 16 << 20

// patience is how long any wait of the suite may take before it counts as a
// hang. It bounds failures; no test measures time.
var patience = 3 * time.Minute

// Resizer is what a Device may have besides, to let Run test Watch and live
// resize. It grows the device to size bytes, a multiple of block.ClusterSize.
type Resizer interface{ Resize(size uint64) error }

// Staller is what a Device may have besides, to let Run test Cancel: until
// resume is called, requests that change data wait for room.
type Staller interface{ Stall() (resume func()) }

// Run holds a Device to the contract of package block. newDevice is called once
// per subtest and returns a fresh device of at least MinSize bytes that reads as
// zeroes throughout and that nobody has claimed; it arranges for its end with
// t.Cleanup. If newDevice returns read-only devices, what concerns those is
// tested instead.
//
// Devices that also implement Resizer or Staller have that tested as well. Run
// prints the seed of its random operations; SCORIA_SEED repeats one.
func Run(t *testing.T, newDevice func(t *testing.T) block.Device) {
	type test struct {
		name string
		run  func(*suite)
	}
	tests := []test{
		{"Info", (*suite).testInfo},
		{"FreshReadsZeroes", (*suite).testFresh},
		{"ReadBack", (*suite).testReadBack},
		{"SegmentsOfOddSizes", (*suite).testSegments},
		{"LargestRequest", (*suite).testLargest},
		{"Range", (*suite).testRange},
		{"Alignment", (*suite).testAlignment},
		{"ZeroLength", (*suite).testZeroLength},
		{"FlushAndFUA", (*suite).testFlush},
		{"Discard", func(s *suite) { s.testZeroing(block.OpDiscard, 0) }},
		{"DiscardFUA", func(s *suite) { s.testZeroing(block.OpDiscard, block.FUA) }},
		{"WriteZeroes", func(s *suite) { s.testZeroing(block.OpWriteZeroes, 0) }},
		{"WriteZeroesNoUnmap", func(s *suite) { s.testZeroing(block.OpWriteZeroes, block.NoUnmap) }},
		{"MixedBatch", (*suite).testBatch},
		{"CompletesOnceAndOutsideSubmit", (*suite).testCompletion},
		{"FaultingMemory", (*suite).testFault},
		{"BlockStatus", (*suite).testBlockStatus},
		{"Claim", (*suite).testClaim},
		{"ClaimRace", (*suite).testClaimRace},
		{"Cancel", (*suite).testCancel},
		{"Watch", (*suite).testWatch},
		{"RandomAgainstModel", (*suite).testModel},
		{"ConcurrentDisjoint", (*suite).testDisjoint},
		{"ConcurrentOverlapping", (*suite).testOverlapping},
	}
	if probe := newDevice(t); probe.Info().ReadOnly {
		tests = []test{
			{"Info", (*suite).testInfo},
			{"ReadOnly", (*suite).testReadOnly},
			{"Range", (*suite).testRange},
			{"Claim", (*suite).testClaim},
		}
	}
	seed := rand.Uint64()
	if v := os.Getenv("SCORIA_SEED"); v != "" {
		var err error
		if seed, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatalf("SCORIA_SEED=%q: must be a decimal number", v)
		}
	}
	t.Logf("SCORIA_SEED=%d", seed)
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			s := &suite{T: t, dev: newDevice(t), seed: seed, rnd: rand.New(rand.NewPCG(seed, 0))}
			s.info = s.dev.Info()
			s.lb = uint64(s.info.LogicalBlock)
			tc.run(s)
		})
	}
}

// suite is one subtest with its device.
type suite struct {
	*testing.T
	dev  block.Device
	info block.Info
	lb   uint64 // logical block, bytes
	seed uint64
	rnd  *rand.Rand
}

// flight is a request with its bookkeeping.
type flight struct {
	block.Request
	taken bool          // not answered by Submit itself
	calls atomic.Int32  // of Complete
	done  chan struct{} // closed by the first call of Complete
}

func newFlight(op block.Op, flags block.Flags, off, length uint64, segs ...[]byte) *flight {
	f := &flight{done: make(chan struct{})}
	f.Op, f.Flags, f.Offset, f.Length, f.Segments = op, flags, off, length, segs
	f.Complete = func(r *block.Request) {
		if r != &f.Request {
			panic("blocktest: Complete was called with another request")
		}
		if f.calls.Add(1) != 1 {
			panic("blocktest: Complete was called twice for " + f.String())
		}
		close(f.done)
	}
	return f
}

func (f *flight) String() string {
	return fmt.Sprintf("%s flags %d [%d,+%d)", f.Op, f.Flags, f.Offset, f.Length)
}

// submit starts flights as one batch.
func submit(dev block.Device, flights ...*flight) {
	batch := make([]*block.Request, len(flights))
	for i, f := range flights {
		batch[i] = &f.Request
	}
	dev.Submit(batch)
	for _, f := range flights {
		f.taken = !f.Ended
	}
}

// wait returns a flight's outcome.
func (f *flight) wait() error {
	if !f.taken {
		if f.calls.Load() != 0 {
			panic("blocktest: Complete was called for " + f.String() + ", which Submit had answered")
		}
		return f.Err
	}
	select {
	case <-f.done:
	case <-time.After(patience):
		hang(f.String() + " did not end")
	}
	return f.Err
}

// hang ends the test program with the stacks of all goroutines.
func hang(what string) {
	buf := make([]byte, 1<<20)
	panic(fmt.Sprintf("blocktest: %s within %v\n%s", what, patience, buf[:runtime.Stack(buf, true)]))
}

// do carries out one request and returns its outcome.
func do(dev block.Device, op block.Op, flags block.Flags, off, length uint64, segs ...[]byte) error {
	f := newFlight(op, flags, off, length, segs...)
	submit(dev, f)
	return f.wait()
}

func (s *suite) write(off uint64, p []byte) {
	s.Helper()
	if err := do(s.dev, block.OpWrite, 0, off, uint64(len(p)), p); err != nil {
		s.Fatalf("write of %d bytes at %d: %v", len(p), off, err)
	}
}

func (s *suite) read(off, length uint64) []byte {
	s.Helper()
	p := make([]byte, length)
	fill(p, 0xdead) // a read must overwrite all of it
	if err := do(s.dev, block.OpRead, 0, off, length, p); err != nil {
		s.Fatalf("read of %d bytes at %d: %v", length, off, err)
	}
	return p
}

// expect compares the device with want from off.
func (s *suite) expect(off uint64, want []byte) {
	s.Helper()
	got := s.read(off, uint64(len(want)))
	if !bytes.Equal(got, want) {
		i := 0
		for got[i] == want[i] {
			i++
		}
		s.Fatalf("byte %d is %#02x, want %#02x (read of %d bytes at %d)", off+uint64(i), got[i], want[i], len(want), off)
	}
}

// fill writes a pattern that depends on the seed and the position.
func fill(p []byte, seed uint64) {
	x := seed*0x9e3779b97f4a7c15 + 1
	for i := 0; i < len(p); i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		var b [8]byte
		binary.LittleEndian.PutUint64(b[:], x)
		copy(p[i:], b[:])
	}
}

func pattern(n uint64, seed uint64) []byte {
	p := make([]byte, n)
	fill(p, seed)
	return p
}

// split cuts p into segments of random, mostly odd sizes, empty ones included.
func split(rnd *rand.Rand, p []byte) [][]byte {
	var segs [][]byte
	for len(p) > 0 {
		n := rnd.IntN(min(len(p), 3*block.ClusterSize) + 1)
		if len(segs) == 63 {
			n = len(p)
		}
		segs = append(segs, p[:n:n])
		p = p[n:]
	}
	return segs
}

func sum(p []byte) uint64 { return maphash.Bytes(hashSeed, p) }

var hashSeed = maphash.MakeSeed()

func (s *suite) testInfo() {
	i := s.info
	switch {
	case i.Name == "":
		s.Error("Name is empty")
	case len(i.Serial) > 20:
		s.Errorf("Serial %q is longer than 20 bytes", i.Serial)
	case i.LogicalBlock != 512 && i.LogicalBlock != 4096:
		s.Errorf("LogicalBlock %d: must be 512 or 4096", i.LogicalBlock)
	case i.PhysicalBlock < i.LogicalBlock || i.PhysicalBlock&(i.PhysicalBlock-1) != 0:
		s.Errorf("PhysicalBlock %d: must be a power of two, at least the logical block %d", i.PhysicalBlock, i.LogicalBlock)
	case i.Size%s.lb != 0:
		s.Errorf("Size %d is no multiple of the logical block %d", i.Size, i.LogicalBlock)
	case i.Size < MinSize:
		s.Fatalf("Size %d: the suite needs at least %d", i.Size, MinSize)
	case s.dev.Info() != i:
		s.Errorf("Info changed without a cause: %+v, was %+v", s.dev.Info(), i)
	}
}

func (s *suite) testFresh() {
	const chunk = 1 << 20
	zeroes := make([]byte, chunk)
	for off := uint64(0); off < s.info.Size; off += s.info.Size/8/chunk*chunk + chunk {
		s.expect(off, zeroes[:min(chunk, s.info.Size-off)])
	}
	s.expect(s.info.Size-s.lb, zeroes[:s.lb])
}

func (s *suite) testReadOnly() {
	s.expect(0, s.read(0, block.ClusterSize))
	p := make([]byte, s.lb)
	for _, op := range []block.Op{block.OpWrite, block.OpDiscard, block.OpWriteZeroes} {
		var segs [][]byte
		if op == block.OpWrite {
			segs = [][]byte{p}
		}
		if err := do(s.dev, op, 0, 0, s.lb, segs...); !errors.Is(err, block.ErrReadOnly) {
			s.Errorf("%s: %v, want ErrReadOnly", op, err)
		}
	}
	if err := do(s.dev, block.OpFlush, 0, 0, 0); err != nil {
		s.Errorf("flush: %v", err)
	}
}

func (s *suite) testRange() {
	size, lb := s.info.Size, s.lb
	p := make([]byte, 4*lb)
	cases := []struct{ off, length uint64 }{
		{size, lb}, {size - lb, 2 * lb}, {size + lb, lb}, {size + lb, 0}, {1 << 62, lb},
		{math.MaxUint64 - lb + 1, lb}, {math.MaxUint64 - lb + 1, 2 * lb},
	}
	for _, op := range []block.Op{block.OpRead, block.OpWrite, block.OpDiscard, block.OpWriteZeroes} {
		for _, c := range cases {
			var segs [][]byte
			if op == block.OpRead || op == block.OpWrite {
				segs = [][]byte{p[:c.length]}
			}
			if err := do(s.dev, op, 0, c.off, c.length, segs...); !errors.Is(err, block.ErrRange) {
				s.Errorf("%s [%d,+%d) of a device of %d bytes: %v, want ErrRange", op, c.off, c.length, size, err)
			}
		}
		if op == block.OpDiscard || op == block.OpWriteZeroes {
			if err := do(s.dev, op, 0, lb, math.MaxUint64-2*lb+1); !errors.Is(err, block.ErrRange) {
				s.Errorf("%s of nearly 2^64 bytes: %v, want ErrRange", op, err)
			}
		}
	}
	if err := do(s.dev, block.OpRead, 0, size-lb, lb, p[:lb]); err != nil {
		s.Errorf("read of the last block: %v", err)
	}
}

func (s *suite) testAlignment() {
	before := pattern(2*block.ClusterSize, 1)
	s.write(0, before)
	p := make([]byte, 2*s.lb)
	for _, op := range []block.Op{block.OpRead, block.OpWrite, block.OpDiscard, block.OpWriteZeroes} {
		for _, c := range []struct{ off, length uint64 }{{1, s.lb}, {0, s.lb - 1}, {s.lb / 2, s.lb / 2}, {0, s.lb + 1}, {s.lb + 1, 0}} {
			var segs [][]byte
			if op == block.OpRead || op == block.OpWrite {
				segs = [][]byte{p[:c.length]}
			}
			if err := do(s.dev, op, 0, c.off, c.length, segs...); !errors.Is(err, block.ErrAlignment) {
				s.Errorf("%s [%d,+%d) with blocks of %d bytes: %v, want ErrAlignment", op, c.off, c.length, s.lb, err)
			}
		}
	}
	s.expect(0, before)
}
