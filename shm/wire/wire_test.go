package wire

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden file")

func examples() map[string][]byte {
	v := Volume{Size: 10 << 30, MaxDiscard: 1 << 20, LogicalBlock: 512, PhysicalBlock: 4096, DiscardAlignment: 4096, Flags: VolumeReadOnly, Serial: "0123456789abcdefghij", Name: "default/vm1"}
	msg := func(h Header, body []byte) []byte { return Append(nil, h, body) }
	return map[string][]byte{
		"01 hello":            msg(Header{Type: Hello, Tag: 1}, HelloRequest{Min: 1, Max: 1}.Append(nil)),
		"01 hello, answer":    msg(Header{Type: Hello | Answer, Tag: 1}, HelloAnswer{Version: 1, MaxRings: 16, MaxEntries: 1024, MaxSegments: 256, MaxArena: 1 << 26, MaxRequest: 32 << 20}.Append(nil)),
		"02 open":             msg(Header{Type: Open, Tag: 2}, Named{Value: OpenReadOnly, Name: "default/vm1"}.Append(nil)),
		"02 open, answer":     msg(Header{Type: Open | Answer, Tag: 2}, v.Append(nil)),
		"02 open, refused":    msg(Header{Type: Open | Answer, Tag: 2, Status: NotFound}, []byte("no such volume")),
		"03 ring":             msg(Header{Type: Ring, Tag: 3}, RingRequest{Entries: 128, Flags: RingReuse, ArenaBytes: 1 << 20}.Append(nil)),
		"03 ring, answer":     msg(Header{Type: Ring | Answer, Tag: 3}, RingAnswer{Ring: 1, MemoryBytes: 1<<20 + 16384}.Append(nil)),
		"04 close ring":       msg(Header{Type: CloseRing, Tag: 4}, AppendCloseRing(nil, 1)),
		"06 create":           msg(Header{Type: Create, Tag: 5}, Named{Value: 10 << 30, Name: "default/vm2"}.Append(nil)),
		"08 list, answer":     msg(Header{Type: List | Answer, Tag: 6}, AppendNames(nil, []string{"default/vm1", "default/vm2"})),
		"09 snapshot":         msg(Header{Type: Snapshot, Tag: 7}, SnapshotRequest{Volume: "default/vm1", Snapshot: "before"}.Append(nil)),
		"100 changed (event)": msg(Header{Type: Changed}, v.Append(nil)),
	}
}

// The bytes are a protocol: programs in other languages speak it.
func TestGolden(t *testing.T) {
	var b strings.Builder
	all := examples()
	var names []string
	for name := range all {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		fmt.Fprintf(&b, "%s\n%s\n", name, hex.Dump(all[name]))
	}
	const file = "testdata/wire.golden"
	if *update {
		if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if b.String() != string(want) {
		t.Fatalf("the protocol changed without its version:\n%s", b.String())
	}
}

func body(t *testing.T, name string) []byte {
	t.Helper()
	_, p, err := Parse(examples()[name])
	if err != nil {
		t.Fatal(name, err)
	}
	return p
}

func TestWhatIsEncodedIsDecoded(t *testing.T) {
	same := func(what string, got, want any, err error) {
		t.Helper()
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, %v; want %+v", what, got, err, want)
		}
	}
	h, _, err := Parse(examples()["02 open, refused"])
	same("header", h, Header{Type: Open | Answer, Tag: 2, Status: NotFound}, err)
	version, err := DecodeHelloRequest(body(t, "01 hello"))
	same("hello", version, uint32(1), err)
	ha, err := DecodeHelloAnswer(body(t, "01 hello, answer"))
	same("hello, answer", ha, HelloAnswer{Version: 1, MaxRings: 16, MaxEntries: 1024, MaxSegments: 256, MaxArena: 1 << 26, MaxRequest: 32 << 20}, err)
	n, err := DecodeNamed(Open, body(t, "02 open"))
	same("open", n, Named{Value: OpenReadOnly, Name: "default/vm1"}, err)
	v, err := DecodeVolume(body(t, "02 open, answer"))
	same("volume", v.Append(nil), body(t, "100 changed (event)"), err)
	r, err := DecodeRingRequest(body(t, "03 ring"))
	same("ring", r, RingRequest{Entries: 128, Flags: RingReuse, ArenaBytes: 1 << 20}, err)
	ra, err := DecodeRingAnswer(body(t, "03 ring, answer"))
	same("ring, answer", ra, RingAnswer{Ring: 1, MemoryBytes: 1<<20 + 16384}, err)
	ring, err := DecodeCloseRing(body(t, "04 close ring"))
	same("close ring", ring, uint64(1), err)
	s, err := DecodeSnapshotRequest(body(t, "09 snapshot"))
	same("snapshot", s, SnapshotRequest{Volume: "default/vm1", Snapshot: "before"}, err)
	names, _, err := DecodeNames(body(t, "08 list, answer"))
	same("list", names, []string{"default/vm1", "default/vm2"}, err)
}

func TestVersions(t *testing.T) {
	for _, tc := range []struct {
		r    HelloRequest
		want uint32
		err  error
	}{
		{HelloRequest{1, 1}, 1, nil}, {HelloRequest{0, 9}, MaxVersion, nil},
		{HelloRequest{MaxVersion + 1, 9}, 0, ErrVersion}, {HelloRequest{0, 0}, 0, ErrVersion}, {HelloRequest{2, 1}, 0, ErrVersion},
	} {
		if got, err := DecodeHelloRequest(tc.r.Append(nil)); got != tc.want || !errors.Is(err, tc.err) {
			t.Errorf("%+v: %d, %v", tc.r, got, err)
		}
	}
	if _, err := DecodeHelloRequest([]byte("GET / HTTP/1.1\r\n\r\n")); !errors.Is(err, ErrMagic) {
		t.Error(err)
	}
}

func TestLongListsAreCut(t *testing.T) {
	var all []string
	for i := range 5000 {
		all = append(all, fmt.Sprintf("default/volume-%05d", i))
	}
	var got []string
	for more := true; more; {
		rest := all[len(got):]
		p := Append(nil, Header{Type: List | Answer}, AppendNames(nil, rest))
		if len(p) > MaxMessage {
			t.Fatalf("message of %d bytes", len(p))
		}
		names, m, err := DecodeNames(p[HeaderBytes:])
		if err != nil || len(names) == 0 {
			t.Fatal(names, err)
		}
		got, more = append(got, names...), m
	}
	if !slices.Equal(got, all) {
		t.Fatalf("%d names, want %d", len(got), len(all))
	}
}

func TestBadMessages(t *testing.T) {
	for name, err := range map[string]error{
		"short":        func() error { _, _, err := Parse(make([]byte, 15)); return err }(),
		"length":       func() error { _, _, err := Parse(make([]byte, 16)); return err }(),
		"open flags":   func() error { _, err := DecodeNamed(Open, Named{Value: 2, Name: "x"}.Append(nil)); return err }(),
		"no name":      func() error { _, err := DecodeNamed(Stat, Named{}.Append(nil)); return err }(),
		"long name":    func() error { _, err := DecodeNamed(Stat, append(make([]byte, 8), make([]byte, 256)...)); return err }(),
		"ring flags":   func() error { _, err := DecodeRingRequest(RingRequest{Flags: 2}.Append(nil)); return err }(),
		"ring length":  func() error { _, err := DecodeRingRequest(make([]byte, 17)); return err }(),
		"close length": func() error { _, err := DecodeCloseRing(make([]byte, 4)); return err }(),
		"snapshot length": func() error {
			_, err := DecodeSnapshotRequest(append(le.AppendUint64(nil, 1<<63), "abc"...))
			return err
		}(),
		"no snapshot": func() error { _, err := DecodeSnapshotRequest(SnapshotRequest{Volume: "v"}.Append(nil)); return err }(),
		"list":        func() error { _, _, err := DecodeNames([]byte{9, 0, 0, 0, 0, 0, 0, 0, 200, 0}); return err }(),
	} {
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// FuzzDecode: whatever is decoded encodes to the same bytes.
func FuzzDecode(f *testing.F) {
	for _, p := range examples() {
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		h, b, err := Parse(p)
		if err != nil {
			return
		}
		if !bytes.Equal(Append(nil, h, b), p) {
			t.Fatal("header")
		}
		again := func(enc []byte, err error) {
			t.Helper()
			if err == nil && !bytes.Equal(enc, b) {
				t.Fatalf("%v: %x became %x", h.Type, b, enc)
			}
		}
		switch h.Type {
		case Hello:
			_, _ = DecodeHelloRequest(b)
		case Hello | Answer:
			_, _ = DecodeHelloAnswer(b)
		case Open, Stat, Create, Resize, List:
			n, err := DecodeNamed(h.Type, b)
			again(n.Append(nil), err)
		case Ring:
			r, err := DecodeRingRequest(b)
			again(r.Append(nil), err)
		case Ring | Answer:
			_, _ = DecodeRingAnswer(b)
		case CloseRing:
			_, _ = DecodeCloseRing(b)
		case Snapshot:
			s, err := DecodeSnapshotRequest(b)
			again(s.Append(nil), err)
		case List | Answer:
			_, _, _ = DecodeNames(b)
		case Changed, Open | Answer:
			_, _ = DecodeVolume(b)
		}
	})
}
