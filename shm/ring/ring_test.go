package ring

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
)

var update = flag.Bool("update", false, "write the golden file")

func pair(t testing.TB, l Layout) (*Server, *Client, []byte) {
	t.Helper()
	mem := alignedMemory(l.TotalBytes())
	l.PutHeader(mem)
	s, err := NewServer(mem, l)
	if err != nil {
		t.Fatal(err)
	}
	c, err := NewClient(mem)
	if err != nil {
		t.Fatal(err)
	}
	return s, c, mem
}

// The bytes of a ring are a protocol: programs in other languages speak it.
func TestGolden(t *testing.T) {
	s, c, mem := pair(t, Layout{Entries: 4, ArenaBytes: 4096})
	PutSegment(c.Arena()[64:], Segment{Addr: 0x400, Length: 512})
	PutSegment(c.Arena()[80:], Segment{Addr: 0x800, Length: 1024})
	c.Add(Request{Cookie: 0x0102030405060708, Offset: 0x1112131415161718, Length: 1536, Addr: 64, Op: OpWrite, Flags: FlagFUA, Segments: 2})
	c.Add(Request{Cookie: 2, Offset: 4096, Length: 1 << 40, Op: OpWriteZeroes, Flags: FlagNoUnmap})
	if c.Publish() {
		t.Fatal("kick wanted by a server that never asked")
	}
	if n, err := s.Ready(); n != 2 || err != nil {
		t.Fatal(n, err)
	}
	var r Request
	for range 2 {
		s.Pop(&r)
	}
	s.Push(Completion{Cookie: 0x0102030405060708})
	s.Push(Completion{Cookie: 2, Status: StatusReadOnly})
	s.Publish()
	s.EnableNotify()
	c.EnableCall()
	got := []byte(hex.Dump(mem))
	const name = "testdata/ring.golden"
	if *update {
		if err := os.WriteFile(name, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("the layout changed without its version:\n%s", got)
	}
}

// Random submissions, completions in any order, wake-ups and wrapping sequences
// against a model of what is under way.
func TestExchange(t *testing.T) {
	for _, start := range []uint32{0, ^uint32(0) - 50} {
		for _, entries := range []int{1, 2, 16, 64} {
			t.Run(fmt.Sprintf("from %d, %d entries", start, entries), func(t *testing.T) {
				s, c, _ := pair(t, Layout{Entries: entries})
				s.taken, s.seen, s.written, s.shown = start, start, start, start
				c.added, c.shown, c.polled = start, start, start
				exchange(t, s, c, entries)
			})
		}
	}
}

func exchange(t *testing.T, s *Server, c *Client, entries int) {
	rnd := rand.New(rand.NewPCG(uint64(entries), 1))
	next := uint64(0)
	var submitted, taken []uint64 // in order
	underWay := 0
	serverSleeps, clientSleeps := false, false
	for range 20_000 {
		switch rnd.IntN(4) {
		case 0:
			n := rnd.IntN(entries - underWay + 1)
			for range n {
				c.Add(Request{Cookie: next, Offset: next * 3, Length: next, Addr: next, Op: uint8(next % 5), Flags: uint8(next % 4)})
				submitted = append(submitted, next)
				next++
			}
			underWay += n
			if c.Publish() {
				serverSleeps = false
			} else if serverSleeps && n > 0 {
				t.Fatal("a sleeping server was not kicked")
			}
		case 1:
			if serverSleeps {
				continue
			}
			ready, err := s.Ready()
			if err != nil {
				t.Fatal(err)
			}
			if ready == 0 {
				if len(submitted) != 0 {
					t.Fatal("published entries are not ready")
				}
				serverSleeps = !s.EnableNotify()
				continue
			}
			s.DisableNotify()
			for range rnd.IntN(ready + 1) {
				var r Request
				s.Pop(&r)
				n := submitted[0]
				if want := (Request{Cookie: n, Offset: n * 3, Length: n, Addr: n, Op: uint8(n % 5), Flags: uint8(n % 4)}); r != want {
					t.Fatalf("took %+v, want %+v", r, want)
				}
				taken, submitted = append(taken, n), submitted[1:]
			}
		case 2:
			n := rnd.IntN(len(taken) + 1)
			for range n {
				i := rnd.IntN(len(taken))
				s.Push(Completion{Cookie: taken[i], Status: Status(taken[i] % 9)})
				taken = slices.Delete(taken, i, i+1)
			}
			for range 1 + rnd.IntN(2) { // the second time there is nothing new
				s.Publish()
			}
			if s.NeedSignal() {
				if clientSleeps = false; n == 0 {
					t.Fatal("the client was called for nothing")
				}
			} else if clientSleeps && n > 0 {
				t.Fatal("a sleeping client was not called")
			}
		case 3:
			if clientSleeps {
				continue
			}
			for {
				done, ok := c.Poll()
				if !ok {
					break
				}
				if done.Status != Status(done.Cookie%9) {
					t.Fatalf("%+v", done)
				}
				underWay--
			}
			if c.DisableCall(); rnd.IntN(2) == 0 {
				clientSleeps = !c.EnableCall()
			}
		}
		if got := len(submitted) + len(taken); got > underWay {
			t.Fatalf("%d under way, but the client counts %d", got, underWay)
		}
	}
}

// A client that waits is not called because the server took its request, and is
// called when there is an answer.
func TestNoCallWithoutACompletion(t *testing.T) {
	s, c, _ := pair(t, Layout{Entries: 4})
	c.Add(Request{Cookie: 7})
	c.Publish()
	if n, err := s.Ready(); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	var r Request
	s.Pop(&r)
	if c.EnableCall() {
		t.Fatal("a completion before there was one")
	}
	if s.Publish(); s.NeedSignal() {
		t.Error("the client is called for nothing")
	}
	s.Push(Completion{Cookie: r.Cookie})
	if s.Publish(); !s.NeedSignal() {
		t.Error("the client is not called for its completion")
	}
}

func TestOverrunIsRefused(t *testing.T) {
	s, c, _ := pair(t, Layout{Entries: 4})
	var r Request
	for range 4 {
		c.Add(Request{})
	}
	c.Publish()
	for n, err := s.Ready(); n > 0; n, err = s.Ready() {
		if err != nil {
			t.Fatal(err)
		}
		s.Pop(&r)
	}
	c.Add(Request{})
	c.Publish()
	if _, err := s.Ready(); !errors.Is(err, ErrOverrun) {
		t.Fatal(err)
	}
}

// An entry without its sequence does not exist, whatever else is written.
func TestP7HalfWrittenEntryIsNotTaken(t *testing.T) {
	s, c, _ := pair(t, Layout{Entries: 4})
	c.Add(Request{Op: OpWrite, Length: 4096})
	c.Add(Request{Op: OpWrite, Length: 4096}) // its sequence is stored, the first one's is not
	if n, err := s.Ready(); n != 0 || err != nil {
		t.Fatal(n, err)
	}
}

func TestP7DataOutsideTheArena(t *testing.T) {
	s, c, _ := pair(t, Layout{Entries: 1, ArenaBytes: 8192})
	list := func(at int, segs ...Segment) {
		for i, seg := range segs {
			PutSegment(c.Arena()[at+i*SegmentBytes:], seg)
		}
	}
	list(0, Segment{4096, 512}, Segment{4096, 512})
	list(64, Segment{4096, 512}, Segment{8000, 512})
	list(128, Segment{4096, 512}, Segment{^uint64(0) - 100, 512})
	list(192, Segment{4096, 0}, Segment{4096, 512})
	list(256, Segment{4096, 512})
	c.Arena()[256+12] = 1
	for _, tc := range []struct {
		name string
		r    Request
		ok   bool
	}{
		{"whole arena", Request{Length: 8192}, true},
		{"one byte at the end", Request{Addr: 8191, Length: 1}, true},
		{"nothing", Request{Addr: 1 << 60}, true},
		{"a byte too long", Request{Addr: 1, Length: 8192}, false},
		{"behind the arena", Request{Addr: 8192, Length: 1}, false},
		{"sum overflows", Request{Addr: ^uint64(0), Length: 2}, false},
		{"length overflows", Request{Addr: 1, Length: ^uint64(0)}, false},
		{"list", Request{Segments: 2, Length: 1024}, true},
		{"list's pieces overlap, length too small", Request{Segments: 2, Length: 512}, false},
		{"piece outside", Request{Addr: 64, Segments: 2, Length: 1024}, false},
		{"piece's sum overflows", Request{Addr: 128, Segments: 2, Length: 1024}, false},
		{"empty piece", Request{Addr: 192, Segments: 2, Length: 512}, false},
		{"reserved bytes of a piece", Request{Addr: 256, Segments: 1, Length: 512}, false},
		{"list outside", Request{Addr: 8192 - 16, Segments: 2, Length: 1024}, false},
		{"list not aligned", Request{Addr: 4, Segments: 1, Length: 512}, false},
		{"list too long", Request{Segments: MaxSegments + 1, Length: 512}, false},
	} {
		data, ok := s.AppendData(nil, &tc.r)
		if ok != tc.ok {
			t.Errorf("%s: accepted %v, want %v", tc.name, ok, tc.ok)
		}
		if n := len(slices.Concat(data...)); ok && uint64(n) != tc.r.Length {
			t.Errorf("%s: %d bytes, want %d", tc.name, n, tc.r.Length)
		}
	}
}

func TestHeaderIsChecked(t *testing.T) {
	l := Layout{Entries: 8, ArenaBytes: 4096}
	good := alignedMemory(l.TotalBytes())
	l.PutHeader(good)
	if got, err := ParseHeader(good); err != nil || got != l {
		t.Fatal(got, err)
	}
	for i := range 48 {
		if i >= 40 { // the arena's size may be another one
			break
		}
		bad := bytes.Clone(good)
		bad[i] ^= 0x55
		if _, err := ParseHeader(bad); !errors.Is(err, ErrHeader) {
			t.Errorf("byte %d: %v", i, err)
		}
	}
	for _, l := range []Layout{{Entries: 0}, {Entries: 3}, {Entries: 2 * MaxEntries}, {Entries: 1, ArenaBytes: 1}, {Entries: 1, ArenaBytes: 2 * MaxArenaBytes}} {
		if _, err := NewServer(good, l); err == nil {
			t.Errorf("%+v accepted", l)
		}
	}
	if _, err := NewServer(good[:l.TotalBytes()-1], l); !errors.Is(err, ErrMemory) {
		t.Error(err)
	}
	if _, err := NewServer(good[8:], Layout{Entries: 1}); !errors.Is(err, ErrMemory) {
		t.Error(err)
	}
}

func TestResetStartsAnew(t *testing.T) {
	s, c, mem := pair(t, Layout{Entries: 4})
	exchange(t, s, c, 4)
	c.Reset()
	s, err := NewServer(mem, c.Layout())
	if err != nil {
		t.Fatal(err)
	}
	exchange(t, s, c, 4)
}

// FuzzServer lets the fuzzer write all of a ring's memory between the server's
// steps: nothing may be touched outside the arena, and no more be taken than
// there are entries.
func FuzzServer(f *testing.F) {
	l := Layout{Entries: 4, ArenaBytes: 4096}
	mem := alignedMemory(l.TotalBytes())
	l.PutHeader(mem)
	c, err := NewClient(mem)
	if err != nil {
		f.Fatal(err)
	}
	c.Add(Request{Op: OpWrite, Length: 64, Segments: 2})
	c.Add(Request{Op: OpRead, Length: 512})
	c.Publish()
	f.Add(bytes.Clone(mem[HeaderBytes:][:4*SubmitBytes]), []byte{1, 2, 3})
	f.Fuzz(func(t *testing.T, client, steps []byte) {
		mem := alignedMemory(l.TotalBytes())
		s, err := NewServer(mem, l)
		if err != nil {
			t.Fatal(err)
		}
		var taken []uint64
		for _, step := range steps {
			copy(mem[HeaderBytes+uint64(step&3)*SubmitBytes:l.CompletionOffset()], client)
			copy(mem[l.ArenaOffset():], client)
			n, err := s.Ready()
			if err != nil {
				return
			}
			for range n {
				var r Request
				s.Pop(&r)
				data, ok := s.AppendData(nil, &r)
				total := uint64(0)
				for _, p := range data {
					total += uint64(len(p))
				}
				if ok && total != r.Length {
					t.Fatalf("%d bytes of data, want %d", total, r.Length)
				}
				taken = append(taken, r.Cookie)
			}
			if len(taken) > l.Entries {
				t.Fatalf("%d requests under way in a ring of %d", len(taken), l.Entries)
			}
			if step&4 != 0 {
				for _, cookie := range taken {
					s.Push(Completion{Cookie: cookie})
				}
				taken = taken[:0]
				s.Publish()
				s.NeedSignal()
			}
		}
	})
}

// BenchmarkExchange is the ring's work alone, 32 requests at once.
func BenchmarkExchange(b *testing.B) {
	s, c, _ := pair(b, Layout{Entries: 64, ArenaBytes: 4096})
	var r Request
	var dst [][]byte
	for b.Loop() {
		for i := range 32 {
			c.Add(Request{Cookie: uint64(i), Length: 4096})
		}
		c.Publish()
		for n, _ := s.Ready(); n > 0; n, _ = s.Ready() {
			for range n {
				s.Pop(&r)
				dst, _ = s.AppendData(dst[:0], &r)
				s.Push(Completion{Cookie: r.Cookie})
			}
			s.Publish()
		}
		for range 32 {
			if _, ok := c.Poll(); !ok {
				b.Fatal("no completion")
			}
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/32, "ns/request")
}
