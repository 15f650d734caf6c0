package alba_test

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"scoria/alba"
)

var update = flag.Bool("update", false, "write the golden files anew")

func good() alba.Preset {
	return alba.Preset{Name: "p", Policies: []alba.Policy{{K: 4, M: 2, C: 5, X: 1}, {K: 2, M: 1, C: 2, X: 1}}, FragmentBytes: 1 << 20}
}

// TestPresetRules: every invalid preset is refused, with the rule that it breaks.
func TestPresetRules(t *testing.T) {
	p := good()
	if err := p.Check(); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		change func(p *alba.Preset)
		rule   string
	}{
		{func(p *alba.Preset) { p.Name = "" }, "must have 1 to"},
		{func(p *alba.Preset) { p.Name = strings.Repeat("x", 64) }, "must have 1 to 63"},
		{func(p *alba.Preset) { p.Policies = nil }, "must have 1 to 8"},
		{func(p *alba.Preset) { p.Policies = make([]alba.Policy, 9) }, "must have 1 to 8"},
		{func(p *alba.Preset) { p.FragmentBytes = 4096 }, "fragment size 4096"},
		{func(p *alba.Preset) { p.FragmentBytes = 1<<20 + 1 }, "multiple of 4096"},
		{func(p *alba.Preset) { p.FragmentBytes = 64 << 20 }, "fragment size"},
		{func(p *alba.Preset) { p.Domain = 9 }, "failure domain 9"},
		{func(p *alba.Preset) { p.Compression = 9 }, "compression 9"},
		{func(p *alba.Preset) { p.Encryption = 9 }, "encryption 9"},
		{func(p *alba.Preset) { p.Policies[1].K = 0 }, "policy 2 (0, 1, 2, 1): k is 0"},
		{func(p *alba.Preset) { p.Policies[0].K = 65 }, "k is 65"},
		{func(p *alba.Preset) { p.Policies[0].M = -1 }, "m is -1"},
		{func(p *alba.Preset) { p.Policies[0].M = 33 }, "m is 33"},
		{func(p *alba.Preset) { p.Policies[0].C = 3 }, "c is 3: must be at least k (4)"},
		{func(p *alba.Preset) { p.Policies[0].C = 7 }, "c is 7: must be at most k+m (6)"},
		{func(p *alba.Preset) { p.Policies[0].X = 0 }, "x is 0"},
		{func(p *alba.Preset) { p.Policies[0].X = 7 }, "x is 7"},
		{func(p *alba.Preset) { p.Policies[0], p.Policies[1] = p.Policies[1], p.Policies[0] }, "can never be chosen"},
	} {
		p := good()
		tt.change(&p)
		if err := p.Check(); !errors.Is(err, alba.ErrPreset) || !strings.Contains(err.Error(), tt.rule) {
			t.Errorf("want the rule %q, got: %v", tt.rule, err)
		}
	}
}

func TestPresetWarnings(t *testing.T) {
	p := alba.Preset{Name: "p", Domain: alba.DomainHost, FragmentBytes: 1 << 20, Policies: []alba.Policy{{K: 4, M: 2, C: 4, X: 3}, {K: 1, M: 0, C: 1, X: 1}}}
	if w := p.Warnings(); len(w) != 2 || !strings.Contains(w[0], "one host can take 3") || !strings.Contains(w[1], "no parity") {
		t.Fatalf("warnings %q", w)
	}
}

func manifest() *alba.Manifest {
	return &alba.Manifest{
		Namespace: "volume", NamespaceID: alba.ID{1, 2}, Object: "sco-7", Upload: alba.ID{3, 4}, Epoch: 5, Size: 1_000_000,
		Created: 1_700_000_000_000_000_000, Generation: 6, Preset: "default", Policy: alba.Policy{K: 2, M: 1, C: 2, X: 1},
		Domain: alba.DomainHost, Compression: alba.CompressZstd, Encryption: alba.EncryptAES256GCM,
		BlockBytes: alba.CompressedBlock, FragmentBytes: 65536, Stored: 700_416, Shards: []string{"disk-a", "", "disk-c"},
	}
}

// TestGoldenRecords: what was stored in the registry and on devices stays readable.
func TestGoldenRecords(t *testing.T) {
	since := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	key := &alba.WrappedKey{Master: "0011223344556677", Nonce: []byte{1}, Sealed: []byte{2, 3}}
	p := good()
	p.Domain, p.Compression, p.Encryption = alba.DomainRack, alba.CompressLZ4, alba.EncryptAES256GCM
	golden(t, "manifest.hex", fmt.Sprintf("%x", manifest().Encode()))
	golden(t, "preset.json", string(alba.Encode(p)))
	golden(t, "namespace.json", string(alba.Encode(alba.Namespace{Name: "n", ID: alba.ID{1}, Epoch: 2, Preset: "p", Deleting: true, Created: since, Key: key})))
	rotated := *key
	rotated.Rotations = 2
	golden(t, "namespace-2.json", string(alba.Encode(alba.Namespace{Name: "n", ID: alba.ID{1}, Epoch: 2, Preset: "p", Created: since, Key: &rotated})))
	for _, name := range []string{"namespace.json", "namespace-2.json"} {
		b, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			t.Fatal(err)
		}
		if n, err := alba.Decode[alba.Namespace](b); err != nil || n.Name != "n" || n.Key == nil || n.Key.Rotations != 2*(n.Version-1) {
			t.Errorf("%s: %+v, %v", name, n, err)
		}
	}
	golden(t, "device.json", string(alba.Encode(alba.Device{ID: "d", Address: "a:1", Host: "h", Rack: "r", Datacentre: "c", State: alba.DeviceDraining, Added: since})))
	golden(t, "intent.json", string(alba.Encode(alba.Intent{Namespace: "n", Object: "o", Epoch: 3, Move: true, Policy: alba.Policy{K: 1, M: 1, C: 1, X: 1}, Shards: []string{"d", ""}, By: "node", Since: since})))
	golden(t, "keys.txt", strings.Join([]string{
		alba.PresetKey("p"), alba.DeviceKey("d"), alba.NamespaceKey("n"), alba.ObjectKey(alba.ID{1}, "o"), alba.IntentKey(alba.ID{1}, alba.ID{2}),
		alba.TrashKey(alba.ID{1}, alba.ID{2}), alba.FragmentKey(alba.ID{1}, alba.ID{2}, 0x3f, 0x1234), alba.ShardKey(alba.ID{1}, alba.ID{2}, 3),
		alba.NamespaceCopyKey(alba.ID{1}), alba.TombstoneKey(alba.ID{1}, alba.ID{2}), alba.PresetCopyKey("p"),
		alba.RemovedKey("d"), alba.RemovedCopyKey("d"), alba.AttemptKey(alba.ID{1}, alba.ID{2}, 3), alba.ClusterCopyKey, alba.ClusterKey, alba.HistoryKey,
		alba.PositionName, alba.CopyName(alba.ID{1}), alba.StatedName("d"), alba.PresetCopyName("p"),
	}, "\n"))
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	name = filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(name, []byte(got+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if got+"\n" != string(want) {
		t.Errorf("%s differs: a change of a format needs a new version.\ngot  %s\nwant %s", name, got, want)
	}
}

func TestRecords(t *testing.T) {
	p := good()
	got, err := alba.Decode[alba.Preset](alba.Encode(p))
	p.Version = alba.RecordVersion
	if err != nil || fmt.Sprint(got) != fmt.Sprint(p) {
		t.Fatalf("%v, error %v; want %v", got, err, p)
	}
	for text, want := range map[string]error{
		`{"version":2}`:                             alba.ErrVersion,
		`{"version":0}`:                             alba.ErrVersion,
		`{"version":1,"unknown":3}`:                 alba.ErrRecord,
		`{"version":1,"compression":"gzip"}`:        alba.ErrRecord,
		`{"version":1,"failure_domain":"universe"}`: alba.ErrRecord,
		`]`: alba.ErrRecord,
	} {
		if _, err := alba.Decode[alba.Preset]([]byte(text)); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", text, err, want)
		}
	}
}

func TestKeysParse(t *testing.T) {
	ns, upload := alba.NewID(), alba.NewID()
	for _, tt := range []struct {
		key          string
		shard, chunk int
	}{{alba.FragmentKey(ns, upload, 17, 99), 17, 99}, {alba.ShardKey(ns, upload, 95), 95, -1}} {
		n, u, s, c, err := alba.ParseShardKey(tt.key)
		if err != nil || n != ns || u != upload || s != tt.shard || c != tt.chunk {
			t.Errorf("%s: %v %v %d %d %v", tt.key, n, u, s, c, err)
		}
	}
	for _, bad := range []string{"", "f/", "n/" + ns.String(), alba.ShardKey(ns, upload, 1) + "/x", "f" + alba.ShardKey(ns, upload, 1)[1:], "f/x/y/00/00000000"} {
		if _, _, _, _, err := alba.ParseShardKey(bad); !errors.Is(err, alba.ErrName) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if n, u, err := alba.SplitKey(alba.TrashKey(ns, upload), alba.TrashPrefix); err != nil || n != ns || u != upload {
		t.Errorf("trash key: %v", err)
	}
}

// TestManifestDamage: no flipped bit and no missing byte of a manifest is accepted.
func TestManifestDamage(t *testing.T) {
	b := manifest().Encode()
	m, err := alba.DecodeManifest(b)
	if err != nil || fmt.Sprint(m) != fmt.Sprint(manifest()) {
		t.Fatalf("%v, error %v", m, err)
	}
	for i := range len(b) {
		if _, err := alba.DecodeManifest(b[:i]); !errors.Is(err, alba.ErrRecord) {
			t.Fatalf("first %d bytes: %v", i, err)
		}
		for bit := range 8 {
			c := bytes.Clone(b)
			c[i] ^= 1 << bit
			if _, err := alba.DecodeManifest(c); !errors.Is(err, alba.ErrRecord) {
				t.Fatalf("bit %d of byte %d: %v", bit, i, err)
			}
		}
	}
}

// FuzzDecodeManifest: whatever decodes is encoded to the same bytes again.
func FuzzDecodeManifest(f *testing.F) {
	f.Add(manifest().Encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := alba.DecodeManifest(alba.FixManifestSum(b))
		if err == nil && !bytes.Equal(m.Encode(), alba.FixManifestSum(b)) {
			t.Fatalf("%x is encoded as %x", b, m.Encode())
		}
	})
}

// TestLayout: the pieces of any range are where the fragments say, without gap or
// overlap, and no chunk is wasted.
func TestLayout(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		unit := alba.Unit(alba.CompressNone, alba.Encryption(rapid.IntRange(0, 1).Draw(rt, "enc")))
		l := alba.Layout{K: rapid.IntRange(1, 20).Draw(rt, "k"), M: 1, Unit: unit, Stored: rapid.Int64Range(1, 1<<31).Draw(rt, "stored")}
		target := rapid.IntRange(alba.MinFragmentBytes, alba.MaxFragmentBytes).Draw(rt, "target")
		l.FragmentBytes = alba.PlanFragment(l.Stored, l.K, target, unit)
		if l.FragmentBytes%unit != 0 || l.FragmentBytes > target+target/4+unit {
			rt.Fatalf("fragment of %d bytes for %d", l.FragmentBytes, target)
		}
		var total int64
		for c := range l.Chunks() {
			n := l.FragmentLen(c)
			if n <= 0 || n%unit != 0 || n > l.FragmentBytes {
				rt.Fatalf("chunk %d: fragments of %d bytes", c, n)
			}
			total += int64(n) * int64(l.K)
		}
		if total < l.Stored || total-l.Stored >= int64(unit)*int64(l.K) {
			rt.Fatalf("%d bytes in fragments of %d", l.Stored, total)
		}
		off := rapid.Int64Range(0, l.Stored-1).Draw(rt, "off")
		n := int(min(rapid.Int64Range(1, 64<<20).Draw(rt, "n"), l.Stored-off))
		sum, next := 0, off
		l.Pieces(off, n, func(p alba.Piece) bool {
			at := int64(p.Chunk)*l.ChunkBytes() + int64(p.Shard)*int64(l.FragmentLen(p.Chunk)) + int64(p.Off)
			if at != next || p.Len <= 0 || p.Off+p.Len > l.FragmentLen(p.Chunk) || p.Shard >= l.K {
				rt.Fatalf("piece %+v at %d, want %d", p, at, next)
			}
			next, sum = next+int64(p.Len), sum+p.Len
			return true
		})
		if sum != n {
			rt.Fatalf("pieces of %d bytes, want %d", sum, n)
		}
	})
}

// TestMasterKeys: wrap, unwrap, rotate, and refuse what is another's.
func TestMasterKeys(t *testing.T) {
	line := func(c string) string { return strings.Repeat(c, 64) }
	first, err := alba.ParseMasterKeys([]byte("# comment\n\n" + line("a") + "\n"))
	if err != nil {
		t.Fatal(err)
	}
	ns := alba.NewID()
	w, err := first.NewKey(ns)
	if err != nil {
		t.Fatal(err)
	}
	key, err := first.Unwrap(ns, w)
	if err != nil || len(key) != alba.KeyBytes {
		t.Fatal(err)
	}
	if _, err := first.Unwrap(alba.NewID(), w); !errors.Is(err, alba.ErrKey) {
		t.Fatalf("another namespace: %v", err)
	}
	both, err := alba.ParseMasterKeys([]byte(line("b") + "\n" + line("a")))
	if err != nil {
		t.Fatal(err)
	}
	rotated, err := both.Rewrap(ns, w)
	if err != nil || rotated.Master == w.Master || rotated.Master != both.Current() {
		t.Fatalf("rotated to %v: %v", rotated, err)
	}
	if again, err := both.Rewrap(ns, rotated); err != nil || again != rotated {
		t.Fatalf("rotated twice: %v", err)
	}
	if got, err := both.Unwrap(ns, rotated); err != nil || !bytes.Equal(got, key) {
		t.Fatalf("another key after rotation: %v", err)
	}
	if _, err := first.Unwrap(ns, rotated); !errors.Is(err, alba.ErrNoKey) {
		t.Fatalf("unwrapped without its master key: %v", err)
	}
	var none *alba.MasterKeys
	if _, err := none.NewKey(ns); !errors.Is(err, alba.ErrNoKey) {
		t.Fatalf("key without a master key: %v", err)
	}
	for _, bad := range []string{"", "# only this", line("a")[:62], line("g"), line("a") + "00"} {
		if _, err := alba.ParseMasterKeys([]byte(bad)); !errors.Is(err, alba.ErrKey) || strings.Contains(err.Error(), "aaaa") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestMasterKeysFromCredential(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "master"), []byte(strings.Repeat("0f", 32)), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	if m, err := alba.LoadMasterKeys("credential:master"); err != nil || m.Current() == "" {
		t.Fatal(err)
	}
	if m, err := alba.LoadMasterKeys(filepath.Join(dir, "master")); err != nil || m.Current() == "" {
		t.Fatal(err)
	}
	if _, err := alba.LoadMasterKeys("credential:../master"); !errors.Is(err, alba.ErrName) {
		t.Fatalf("path in a credential's name: %v", err)
	}
	t.Setenv("CREDENTIALS_DIRECTORY", "")
	if _, err := alba.LoadMasterKeys("credential:master"); !errors.Is(err, alba.ErrNoKey) {
		t.Fatalf("without credentials: %v", err)
	}
}
