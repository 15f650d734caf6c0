package host

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// TestExampleFileIsTheDefaults: packaging/scoria.toml is what --print-config
// prints, and reads as the defaults.
func TestExampleFileIsTheDefaults(t *testing.T) {
	want, err := PrintConfig(DefaultConfig())
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join("..", "..", "packaging", "scoria.toml")
	got, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Fatalf("packaging/scoria.toml differs from `scoriad --print-config`, which prints\n%s", want)
	}
	c, err := LoadConfig(name)
	if err != nil || !reflect.DeepEqual(c, DefaultConfig()) {
		t.Fatalf("the file reads as %+v, %v", c, err)
	}
}

// TestEveryKeyHasAComment walks Config.
func TestEveryKeyHasAComment(t *testing.T) {
	var walk func(t *testing.T, typ reflect.Type, path string)
	walk = func(t *testing.T, typ reflect.Type, path string) {
		for i := range typ.NumField() {
			f := typ.Field(i)
			key := path + f.Tag.Get("toml")
			switch {
			case f.Tag.Get("toml") == "":
				t.Errorf("%s: no key", f.Name)
			case f.Type.Kind() == reflect.Struct:
				walk(t, f.Type, key+".")
			case f.Tag.Get("comment") == "":
				t.Errorf("%s: no comment", key)
			}
		}
	}
	walk(t, reflect.TypeFor[Config](), "")
}

func TestConfigReads(t *testing.T) {
	c, err := parseConfig("f", []byte("data_dir = \"/d\"\n[write_buffer]\nsize = \"128M\"\n[vhost]\npoll = \"20us\"\nworkers = 3\n[sockets]\nmode = \"0600\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := DefaultConfig()
	want.DataDir, want.WriteBuffer.Size = "/d", 128<<20
	want.Vhost.Poll, want.Vhost.Workers, want.Sockets.Mode = Duration(20*time.Microsecond), 3, 0o600
	if !reflect.DeepEqual(c, want) {
		t.Fatalf("%+v\nwant\n%+v", c, want)
	}
}

func TestConfigErrorsNameTheLineAndWhatIsRight(t *testing.T) {
	for text, want := range map[string][]string{
		"data_dir = \"/d\"\ncolour = \"red\"\n":          {"f line 2", `unknown key "colour"`, "--print-config"},
		"[vhost]\npol = \"1us\"\n":                       {"f line 2", `"vhost.pol"`},
		"[vhost\n":                                       {"f line 1"},
		"data_dir = 5\n":                                 {"f line 1"},
		"\n[write_buffer]\nsize = \"lots\"\n":            {"f line 3", "must be a number of bytes"},
		"[vhost]\npoll = \"fast\"\n":                     {"f line 2", "such as 50us"},
		"[vhost]\npoll = \"2s\"\n":                       {"vhost.poll", "0s to 1s"},
		"[vhost]\nworkers = -1\n":                        {"vhost.workers", "0 to 256"},
		"[sockets]\nmode = \"9\"\n":                      {"octal"},
		"[sockets]\ngroup = \"no-such-group-here\"\n":    {"sockets.group", "no such group"},
		"[log]\nlevel = \"loud\"\n":                      {"log.level", "trace, debug"},
		"[log]\nformat = \"xml\"\n":                      {"log.format"},
		"[metrics]\naddress = \"9710\"\n":                {"metrics.address", "127.0.0.1:9710"},
		"data_dir = \"relative\"\n":                      {"data_dir", "absolute"},
		"run_dir = \"/" + strings.Repeat("r", 90) + "\"": {"run_dir", "at most 80"},
		"[write_buffer]\nsize = \"1M\"\n":                {"write_buffer.size", "64MiB"},
		"[pool]\nblock_size = 1024\n":                    {"pool.block_size", "512 or 4096"},
		"[pool]\nsco_size = \"1500K\"\n":                 {"pool.sco_size", "multiple of 1M"},
	} {
		_, err := parseConfig("f", []byte(text))
		for _, w := range want {
			if err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("%q: %v; want %q", text, err, w)
			}
		}
	}
}

func TestSizes(t *testing.T) {
	for in, want := range map[string]Size{"0": 0, "4096": 4096, "10G": 10 << 30, "10GiB": 10 << 30, "1t": 1 << 40, "1.5M": 3 << 19, "512b": 512} {
		got, err := ParseSize(in)
		if err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v; want %d", in, got, err, want)
		}
		if again, err := ParseSize(got.String()); err != nil || again != got {
			t.Errorf("%d is written %q, which reads as %d, %v", got, got, again, err)
		}
	}
	for _, in := range []string{"", "-1", "10X", "G", "1e30T", "99999999999999G", "10 potatoes"} {
		if got, err := ParseSize(in); err == nil {
			t.Errorf("ParseSize(%q) = %d; want an error", in, got)
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	if b, err := PrintConfig(DefaultConfig()); err == nil {
		f.Add(b)
	}
	f.Fuzz(func(_ *testing.T, b []byte) {
		parseConfig("f", b)
	})
}
