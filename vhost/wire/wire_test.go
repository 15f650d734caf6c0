package wire

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var (
	goldenRegion = Region{GuestAddr: 0x40000000, Size: 0x8000000, UserAddr: 0x7f1200000000, MmapOffset: 0x1000}
	golden       = []struct {
		name    string
		request Request
		flags   uint32
		payload []byte
	}{
		{"get_features", GetFeatures, 0, nil},
		{"set_features", SetFeatures, FlagNeedReply, AppendU64(nil, 0x140000200)},
		{"features", GetFeatures, FlagReply, AppendU64(nil, 0x140000200)},
		{"set_vring_num", SetVringNum, 0, VringState{Index: 1, Num: 128}.Append(nil)},
		{"set_vring_addr", SetVringAddr, 0, VringAddr{Index: 2, Flags: VringFlagLog, Desc: 0x7f1200000000, Used: 0x7f1200002000, Avail: 0x7f1200001000, Log: 0x40002000}.Append(nil)},
		{"set_vring_kick", SetVringKick, 0, VringFD{Index: 3}.Append(nil)},
		{"set_vring_call_none", SetVringCall, 0, VringFD{Index: 3, NoFD: true}.Append(nil)},
		{"set_mem_table", SetMemTable, FlagNeedReply, AppendMemTable(nil, []Region{goldenRegion, {Size: 0xa0000, UserAddr: 0x7f1300000000}})},
		{"add_mem_reg", AddMemReg, FlagNeedReply, AppendRegion(nil, goldenRegion)},
		{"set_log_base", SetLogBase, 0, Log{Size: 0x10000, Offset: 0x1000}.Append(nil)},
		{"get_config", GetConfig, 0, Config{Offset: 32, Flags: ConfigMigration, Data: []byte{1, 2, 3}}.Append(nil)},
		{"get_inflight", GetInflightFD, FlagReply, Inflight{MmapSize: 0x2000, MmapOffset: 0x40, Queues: 4, QueueSize: 128}.Append(nil)},
		{"config_change", BackendConfigChange, 0, nil},
	}
)

// The bytes of the messages are what QEMU sends and expects.
func TestGolden(t *testing.T) {
	var got strings.Builder
	for _, g := range golden {
		got.WriteString(g.name + "\n" + hex.Dump(AppendMessage(nil, g.request, g.flags, g.payload)))
	}
	path := filepath.Join("testdata", "messages.golden")
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != string(want) {
		t.Fatalf("messages differ from %s:\n%s", path, got.String())
	}
}

func TestRoundTrip(t *testing.T) {
	check := func(name string, got, want any, err error) {
		t.Helper()
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, %v, want %+v", name, got, err, want)
		}
	}
	state := VringState{Index: 1, Num: 2}
	s, err := DecodeVringState(SetVringNum, state.Append(nil))
	check("state", s, state, err)
	addr := VringAddr{Index: 1, Flags: 1, Desc: 16, Used: 32, Avail: 48, Log: 64}
	a, err := DecodeVringAddr(addr.Append(nil))
	check("addr", a, addr, err)
	fd := VringFD{Index: 255, NoFD: true}
	v, err := DecodeVringFD(SetVringErr, fd.Append(nil), 0)
	check("fd", v, fd, err)
	regions := []Region{goldenRegion, {Size: 1}}
	rs, err := DecodeMemTable(AppendMemTable(nil, regions), 2)
	check("table", rs, regions, err)
	r, err := DecodeRegion(AddMemReg, AppendRegion(nil, goldenRegion))
	check("region", r, goldenRegion, err)
	log := Log{Size: 8, Offset: 16}
	l, err := DecodeLog(log.Append(nil))
	check("log", l, log, err)
	cfg := Config{Offset: 3, Flags: 1, Data: []byte{9}}
	c, err := DecodeConfig(SetConfig, cfg.Append(nil))
	check("config", c, cfg, err)
	inf := Inflight{MmapSize: 1, MmapOffset: 2, Queues: 3, QueueSize: 4}
	i, err := DecodeInflight(SetInflightFD, inf.Append(nil))
	check("inflight", i, inf, err)
}

// Every refusal is of its kind and names the message.
func TestRefusals(t *testing.T) {
	for _, c := range []struct {
		name string
		err  error
		want error
		text string
	}{
		{"short header", second(ParseHeader(make([]byte, 11))), ErrSize, "header"},
		{"version 0", second(ParseHeader(make([]byte, 12))), ErrVersion, "version 0"},
		{"unknown", CheckRequest(Header{Request: 77}), ErrUnknown, "message 77"},
		{"postcopy, which is not offered", CheckRequest(Header{Request: 28}), ErrUnknown, "message 28"},
		{"reply flag", CheckRequest(Header{Request: GetFeatures, Flags: FlagReply}), ErrFlags, "GET_FEATURES"},
		{"long", CheckRequest(Header{Request: SetMemTable, Size: 300}), ErrSize, "SET_MEM_TABLE"},
		{"short", CheckRequest(Header{Request: SetVringAddr, Size: 39}), ErrSize, "SET_VRING_ADDR"},
		{"other reply", CheckReply(Header{Request: GetFeatures, Flags: FlagReply}, SetFeatures), ErrUnknown, "SET_FEATURES"},
		{"no reply flag", CheckReply(Header{Request: GetFeatures}, GetFeatures), ErrFlags, "GET_FEATURES"},
		{"reply size", CheckReply(Header{Request: GetFeatures, Flags: FlagReply, Size: 9}, GetFeatures), ErrSize, "GET_FEATURES"},
		{"descriptors", CheckFDs(SetOwner, 1), ErrFDs, "SET_OWNER"},
		{"no descriptor", CheckFDs(AddMemReg, 0), ErrFDs, "ADD_MEM_REG"},
		{"kick and none", second(DecodeVringFD(SetVringKick, AppendU64(nil, 0x100), 1)), ErrFDs, "SET_VRING_KICK"},
		{"nine regions", second(DecodeMemTable([]byte{9, 0, 0, 0, 0, 0, 0, 0}, 9)), ErrField, "SET_MEM_TABLE"},
		{"regions missing", second(DecodeMemTable([]byte{1, 0, 0, 0, 0, 0, 0, 0}, 1)), ErrSize, "SET_MEM_TABLE"},
		{"config overflow", second(DecodeConfig(GetConfig, Config{Offset: ^uint32(0), Data: []byte{1}}.Append(nil))), ErrField, "GET_CONFIG"},
		{"empty log", second(DecodeLog(make([]byte, 16))), ErrField, "SET_LOG_BASE"},
	} {
		if !errors.Is(c.err, c.want) || !strings.Contains(c.err.Error(), c.text) {
			t.Errorf("%s: %v, want %v naming %s", c.name, c.err, c.want, c.text)
		}
	}
}

func second[T any](_ T, err error) error { return err }

// FuzzMessage decodes anything: what is accepted is within its limits and is
// encoded as it was.
func FuzzMessage(f *testing.F) {
	for _, g := range golden {
		f.Add(AppendMessage(nil, g.request, g.flags, g.payload), uint8(1))
	}
	f.Fuzz(func(t *testing.T, b []byte, fds uint8) {
		h, err := ParseHeader(b)
		if err != nil || CheckRequest(h) != nil || CheckFDs(h.Request, int(fds)) != nil {
			return
		}
		p := b[HeaderSize:]
		if uint64(len(p)) < uint64(h.Size) {
			return
		}
		p = p[:h.Size]
		if len(p) > MaxPayload {
			t.Fatalf("%v of %d bytes", h.Request, len(p))
		}
		again := p
		switch h.Request {
		case SetMemTable:
			if rs, err := DecodeMemTable(p, int(fds)); err == nil {
				again = append(AppendMemTable(nil, rs)[:4], p[4:8]...)
				again = append(again, AppendMemTable(nil, rs)[8:]...)
				p = p[:len(again)]
			}
		case AddMemReg, RemMemReg:
			if r, err := DecodeRegion(h.Request, p); err == nil {
				again = append(p[:8:8], AppendRegion(nil, r)[8:]...)
			}
		case SetVringAddr:
			if v, err := DecodeVringAddr(p); err == nil {
				again = v.Append(nil)
			}
		case SetVringNum, SetVringBase, GetVringBase, SetVringEnable:
			if v, err := DecodeVringState(h.Request, p); err == nil {
				again = v.Append(nil)
			}
		case SetVringKick, SetVringCall, SetVringErr:
			if v, err := DecodeVringFD(h.Request, p, int(fds)); err == nil {
				again = v.Append(nil)
			}
		case SetLogBase:
			if v, err := DecodeLog(p); err == nil {
				again = v.Append(nil)
			}
		case GetConfig, SetConfig:
			if v, err := DecodeConfig(h.Request, p); err == nil {
				again = v.Append(nil)
			}
		case GetInflightFD, SetInflightFD:
			if v, err := DecodeInflight(h.Request, p); err == nil {
				again = append(v.Append(nil)[:inflightMinSize], p[inflightMinSize:]...)
			}
		}
		if !bytes.Equal(again, p) {
			t.Fatalf("%v: % x became % x", h.Request, p, again)
		}
	})
}
