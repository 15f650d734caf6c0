package metamorphic

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"reflect"
	"strconv"
	"strings"
)

// op is one operation. What a kind does not use is zero.
type op struct {
	Kind string
	Vol  string // volume, POOL/NAME
	Snap string // snapshot of it, or name to make
	To   string // another volume, snapshot, or what a flag is set to
	Off  uint64 // sectors
	N    uint64 // sectors, or a count
	Seed uint64 // of the data, or of what chance decides
	Mod  string // modifiers, joined by commas
}

func (o op) has(mod string) bool {
	for m := range strings.SplitSeq(o.Mod, ",") {
		if m == mod {
			return true
		}
	}
	return false
}

func (o op) String() string { return encodeFields(o.Kind, reflect.ValueOf(o)) }

// settings are what a world is made with.
type settings struct {
	SCO      uint64 // MiB of a SCO
	Pool     uint64 // MiB of write buffer
	Local    uint64 // MiB of local copies
	Read     uint64 // KiB of read cache
	SSD      uint64 // MiB of second read cache; 0: none
	Compress string // of the object store's preset
	Encrypt  string
	DirOnly  bool // directory store only
	Objects  bool // object store only
}

func (s settings) String() string { return encodeFields("settings", reflect.ValueOf(s)) }

func randomSettings(rng *rand.Rand) settings {
	pick := func(list ...uint64) uint64 { return list[rng.IntN(len(list))] }
	s := settings{
		SCO: pick(1, 1, 2, 4), Pool: pick(6, 8, 12, 32), Local: pick(1, 4, 1024), Read: pick(64, 1024), SSD: pick(0, 0, 16),
		Compress: []string{"none", "lz4", "zstd"}[rng.IntN(3)], Encrypt: []string{"none", "aes-256-gcm"}[rng.IntN(2)],
		DirOnly: rng.IntN(3) == 0,
	}
	s.Objects = !s.DirOnly && rng.IntN(2) == 0
	return s
}

// trace is what is run, and can be run again.
type trace struct {
	settings settings
	ops      []op
}

// encodeFields writes a line: the name, then field=value of all fields of v that are not
// zero, in small letters. A field Kind is the name.
func encodeFields(name string, v reflect.Value) string {
	var b strings.Builder
	b.WriteString(name)
	for i := range v.NumField() {
		if field := v.Type().Field(i).Name; field != "Kind" && !v.Field(i).IsZero() {
			fmt.Fprintf(&b, " %s=%v", strings.ToLower(field), v.Field(i))
		}
	}
	return b.String()
}

// decodeFields is the inverse of encodeFields.
func decodeFields(words []string, v reflect.Value) error {
	for _, w := range words {
		key, value, ok := strings.Cut(w, "=")
		f := v.FieldByNameFunc(func(n string) bool { return strings.ToLower(n) == key })
		if !ok || !f.IsValid() {
			return fmt.Errorf("%q: no such field", w)
		}
		var err error
		switch f.Kind() {
		case reflect.String:
			f.SetString(value)
		case reflect.Uint64:
			var n uint64
			n, err = strconv.ParseUint(value, 10, 64)
			f.SetUint(n)
		case reflect.Bool:
			var is bool
			is, err = strconv.ParseBool(value)
			f.SetBool(is)
		}
		if err != nil {
			return fmt.Errorf("%q: %w", w, err)
		}
	}
	return nil
}

func (t *trace) String() string {
	var b strings.Builder
	fmt.Fprintln(&b, t.settings)
	for _, o := range t.ops {
		fmt.Fprintln(&b, o)
	}
	return b.String()
}

// parseTrace reads what String wrote. Empty lines and those that begin with # are
// skipped.
func parseTrace(r io.Reader) (*trace, error) {
	t := new(trace)
	s := bufio.NewScanner(r)
	for n := 1; s.Scan(); n++ {
		words := strings.Fields(s.Text())
		if len(words) == 0 || strings.HasPrefix(words[0], "#") {
			continue
		}
		var err error
		if words[0] == "settings" {
			err = decodeFields(words[1:], reflect.ValueOf(&t.settings).Elem())
		} else {
			o := op{Kind: words[0]}
			if kinds[o.Kind].do == nil {
				return nil, fmt.Errorf("line %d: no operation %q", n, o.Kind)
			}
			err = decodeFields(words[1:], reflect.ValueOf(&o).Elem())
			t.ops = append(t.ops, o)
		}
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
	}
	return t, s.Err()
}
