package nbd

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"scoria/driver/block"
	"scoria/driver/block/blocktest"
)

func ram(size uint64, opts blocktest.Options) *blocktest.RAM {
	if opts.Name == "" {
		opts.Name = "default/vm1"
	}
	return blocktest.NewRAM(size, opts)
}

func pattern(n int, seed uint64) []byte {
	p := make([]byte, n)
	rnd := rand.New(rand.NewPCG(seed, 1))
	for i := range p {
		p[i] = byte(rnd.Uint32()) | 1
	}
	return p
}

func TestHandshakeOptions(t *testing.T) {
	f := serve(t, nil, ram(1<<20, blocktest.Options{}), ram(1<<20, blocktest.Options{Name: "fast/vm2", ReadOnly: true}))
	c := f.dial(t)
	var names []string
	for _, r := range c.option(optList, nil) {
		if r.typ == repServer {
			names = append(names, string(r.data[4:]))
		}
	}
	if got := strings.Join(names, " "); got != "default/vm1 fast/vm2" {
		t.Errorf("exports %q", got)
	}
	for _, tc := range []struct {
		why    string
		option uint32
		data   []byte
		want   uint32
	}{
		{"unknown option", 4711, []byte("xyz"), repErrUnsup},
		{"TLS", optStartTLS, nil, repErrPolicy},
		{"list with data", optList, []byte{1}, repErrInvalid},
		{"structured with data", optStructuredReply, []byte{1}, repErrInvalid},
		{"meta before structured", optSetMeta, metaRequest("vm1", contextAllocation), repErrInvalid},
		{"info of no export", optInfo, infoRequest("vm9"), repErrUnknown},
		{"go to no export", optGo, infoRequest("vm9"), repErrUnknown},
		{"empty name", optGo, infoRequest(""), repErrInvalid},
		{"bad option in name", optGo, infoRequest("vm1:color=red"), repErrInvalid},
		{"bad size in name", optGo, infoRequest("vm1:size=much"), repErrInvalid},
		{"info may not create", optInfo, infoRequest("vm9:size=1M"), repErrUnknown},
		{"larger than it is", optGo, infoRequest("vm1:size=2M"), repErrPolicy},
		{"name longer than data", optInfo, []byte{0, 0, 0, 9, 'x', 0, 0}, repErrInvalid},
		{"no data", optGo, nil, repErrInvalid},
		{"missing requests", optGo, append(infoRequest("vm1"), 1), repErrInvalid},
		{"long name", optGo, infoRequest(strings.Repeat("n", 5000)), repErrTooBig},
		{"structured", optStructuredReply, nil, repAck},
		{"many queries", optSetMeta, metaRequest("vm1", make([]string, maxQueries+1)...), repErrTooBig},
		{"cut query", optSetMeta, metaRequest("vm1", "base:")[:12], repErrInvalid},
		{"list for no export", optListMeta, metaRequest("vm9"), repErrUnknown},
	} {
		replies := c.option(tc.option, tc.data)
		if last := replies[len(replies)-1]; last.typ != tc.want {
			t.Errorf("%s: %#x %q, want %#x", tc.why, last.typ, last.data, tc.want)
		}
	}
	for _, tc := range []struct {
		option  uint32
		queries []string
		want    string
	}{
		{optListMeta, nil, contextAllocation},
		{optListMeta, []string{"base:"}, contextAllocation},
		{optListMeta, []string{"qemu:"}, ""},
		{optSetMeta, nil, ""},
		{optSetMeta, []string{"base:"}, ""},
		{optSetMeta, []string{"x-y:z", contextAllocation}, contextAllocation},
	} {
		got := ""
		for _, r := range c.option(tc.option, metaRequest("vm1", tc.queries...)) {
			if r.typ == repMeta {
				got += string(r.data[4:])
			}
		}
		if got != tc.want {
			t.Errorf("option %d with %q selects %q, want %q", tc.option, tc.queries, got, tc.want)
		}
	}
	if r := c.option(optAbort, nil); r[0].typ != repAck {
		t.Errorf("abort: %#x", r[0].typ)
	}
	c.ended()
}

func TestTransmissionFlags(t *testing.T) {
	f := serve(t, nil, ram(1<<20, blocktest.Options{}), ram(1<<20, blocktest.Options{Name: "default/ro", ReadOnly: true}))
	const always = txHasFlags | txFlush | txFUA | txTrim | txWriteZeroes | txFastZero | txMultiConn
	if c := f.connect(t, "vm1"); c.flags != always|txDF || c.size != 1<<20 {
		t.Errorf("flags %#x size %d", c.flags, c.size)
	}
	c := f.dial(t)
	if c.mustGo("default/ro"); c.flags != always|txReadOnly {
		t.Errorf("flags %#x of a read-only export without structured replies", c.flags)
	}
	for _, typ := range []uint16{cmdWrite, cmdTrim, cmdWriteZeroes} {
		var p []byte
		if typ == cmdWrite {
			p = make([]byte, 512)
		}
		if r := c.do(typ, 0, 0, 512, p); r.code != ePerm {
			t.Errorf("command %d on a read-only export: %d, want EPERM", typ, r.code)
		}
	}
}

func TestExportNameOption(t *testing.T) {
	f := serve(t, nil, ram(1<<20, blocktest.Options{}))
	c := f.dial(t)
	c.send(appendOption(nil, optExportName, []byte("vm1")))
	if b := c.bytes(10); binary.BigEndian.Uint64(b) != 1<<20 {
		t.Errorf("export of % x", b)
	}
	c.write(10, []byte("hello"))
	if got := c.read(9, 7); string(got) != "\x00hello\x00" {
		t.Errorf("read %q", got)
	}
	c = f.dial(t)
	c.send(appendOption(nil, optExportName, []byte("vm9")))
	c.ended()
}

var update = flag.Bool("update", false, "rewrite the golden files")

// TestGoldenSession holds every byte that the server sends in a session which
// uses each kind of message.
func TestGoldenSession(t *testing.T) {
	f := serve(t, nil, ram(1<<20, blocktest.Options{}))
	nc, err := net.Dial("unix", f.path)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	_ = nc.SetDeadline(time.Now().Add(patience))
	var log strings.Builder
	r := bufio.NewReader(nc)
	step := func(name string, send []byte) {
		if _, err := nc.Write(send); err != nil {
			t.Fatal(err)
		}
		log.WriteString("# " + name + "\n")
		for last := false; !last; {
			var b []byte
			if b, last, err = message(r); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			for line := range slices.Chunk(b, 16) {
				fmt.Fprintf(&log, "% x\n", line)
			}
		}
	}
	cmd := func(typ, flags uint16, off uint64, length uint32, payload string) []byte {
		return append(appendRequest(nil, request{typ: typ, flags: flags, cookie: 0x1122334455667788, offset: off, length: length}), payload...)
	}
	step("greeting", nil)
	step("list", append([]byte{0, 0, 0, 3}, appendOption(nil, optList, nil)...))
	step("structured replies", appendOption(nil, optStructuredReply, nil))
	step("select base:allocation", appendOption(nil, optSetMeta, metaRequest("vm1", contextAllocation)))
	step("unknown export", appendOption(nil, optInfo, infoRequest("a:b")))
	step("go", appendOption(nil, optGo, infoRequest("vm1", infoName, infoDescription, infoBlockSize)))
	step("write", cmd(cmdWrite, cmdFlagFUA, 4096, 8, "datadata"))
	step("read", cmd(cmdRead, 0, 4096, 512, ""))
	step("read with holes", cmd(cmdRead, 0, 0, 65536, ""))
	step("block status", cmd(cmdBlockStatus, 0, 0, 65536, ""))
	step("error", cmd(cmdTrim, 0, 1<<20, 512, ""))
	golden := filepath.Join("testdata", "session.golden")
	if *update {
		if err := os.WriteFile(golden, []byte(log.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if string(want) != log.String() {
		t.Errorf("the session differs from %s (run with -update if that is meant):\n%s", golden, log.String())
	}
}

// message reads one message of the server; last says that nothing follows until
// the client sends again.
func message(r *bufio.Reader) (b []byte, last bool, err error) {
	take := func(n int) (p []byte) {
		p = make([]byte, n)
		if err == nil {
			_, err = io.ReadFull(r, p)
		}
		b = append(b, p...)
		return p
	}
	magic := take(4)
	switch {
	case string(magic) == "NBDM":
		take(14)
		return b, true, err
	case binary.BigEndian.Uint32(magic) == magicSimple:
		take(12)
		return b, true, err
	case binary.BigEndian.Uint32(magic) == magicStructured:
		h := take(16)
		take(int(binary.BigEndian.Uint32(h[12:])))
		return b, binary.BigEndian.Uint16(h)&chunkDone != 0, err
	}
	h := take(16)
	take(int(binary.BigEndian.Uint32(h[12:])))
	typ := binary.BigEndian.Uint32(h[8:])
	return b, typ == repAck || typ >= 1<<31, err
}

func TestCommandErrors(t *testing.T) {
	for _, structured := range []bool{false, true} {
		f := serve(t, nil, ram(1<<20, blocktest.Options{}))
		c := f.dial(t)
		if structured {
			c.structure("vm1")
		}
		c.mustGo("vm1")
		status := uint32(eInval) // nothing was negotiated
		df := uint32(eInval)
		if structured {
			status, df = 0, 0
		}
		for _, tc := range []struct {
			why        string
			typ, flags uint16
			off        uint64
			length     uint32
			want       uint32
		}{
			{"read behind the end", cmdRead, 0, 1 << 20, 512, eInval},
			{"read across the end", cmdRead, 0, 1<<20 - 512, 1024, eInval},
			{"unaligned read across the end", cmdRead, 0, 1<<20 - 1, 2, eInval},
			{"sparse read across the end", cmdRead, 0, 1<<20 - 512, 1 << 20, eInval},
			{"read at 2^64", cmdRead, 0, 1<<64 - 1, 2, eInval},
			{"read too large", cmdRead, 0, 0, maxPayload + 1, eOverflow},
			{"read of nothing", cmdRead, 0, 0, 0, 0},
			{"unaligned read of nothing", cmdRead, 0, 7, 0, 0},
			{"read with NO_HOLE", cmdRead, cmdFlagNoHole, 0, 512, eInval},
			{"read with DF", cmdRead, cmdFlagDF, 0, 512, df},
			{"write behind the end", cmdWrite, 0, 1 << 20, 512, eNoSpc},
			{"unaligned write across the end", cmdWrite, 0, 1<<20 - 1, 2, eNoSpc},
			{"write of nothing", cmdWrite, 0, 5, 0, 0},
			{"write with DF", cmdWrite, cmdFlagDF, 0, 512, eInval},
			{"trim across the end", cmdTrim, 0, 1<<20 - 1, 2, eInval},
			{"trim of nearly 4 GiB", cmdTrim, 0, 0, 1<<32 - 1, eInval},
			{"trim of less than a block", cmdTrim, cmdFlagFUA, 1, 600, 0},
			{"zeroes behind the end", cmdWriteZeroes, 0, 1 << 20, 1, eNoSpc},
			{"zeroes with every flag", cmdWriteZeroes, cmdFlagFUA | cmdFlagNoHole | cmdFlagFastZero, 0, 512, 0},
			{"fast zeroes of parts", cmdWriteZeroes, cmdFlagFastZero, 1, 512, eNotSup},
			{"flush with offset", cmdFlush, cmdFlagFUA, 77, 99, 0},
			{"flush with flags", cmdFlush, cmdFlagReqOne, 0, 0, eInval},
			{"status", cmdBlockStatus, 0, 0, 512, status},
			{"status behind the end", cmdBlockStatus, 0, 1 << 20, 1, eInval},
			{"status of nothing", cmdBlockStatus, 0, 0, 0, eInval},
			{"cache", 5, 0, 0, 512, eInval},
			{"resize", 8, 0, 0, 512, eInval},
			{"unknown command", 999, 0xffff, 0, 512, eInval},
		} {
			var p []byte
			if tc.typ == cmdWrite {
				p = make([]byte, tc.length)
			}
			r := c.do(tc.typ, tc.flags, tc.off, tc.length, p)
			if r.code != tc.want {
				t.Errorf("%s (structured %v): error %d %q, want %d", tc.why, structured, r.code, r.message, tc.want)
			}
			if structured && r.code != 0 && r.message == "" {
				t.Errorf("%s: no message", tc.why)
			}
		}
		if got := c.read(0, 4096); !bytes.Equal(got, make([]byte, 4096)) {
			t.Error("an erroneous command changed the volume")
		}
	}
}

func TestReadSendsHolesAndBlockStatus(t *testing.T) {
	f := serve(t, nil, ram(8<<20, blocktest.Options{Mode: blocktest.Mixed}))
	c := f.connect(t, "vm1")
	data := pattern(8192, 1)
	c.write(1<<20, data)
	r := c.do(cmdRead, 0, 0, 4<<20, nil)
	if len(r.data) != 1 || !bytes.Equal(r.data[1<<20], data) || r.holes[0] != 1<<20 || r.holes[1<<20+8192] != 3<<20-8192 {
		t.Errorf("%d data chunks, holes %v", len(r.data), r.holes)
	}
	r = c.do(cmdRead, cmdFlagDF, 0, 4<<20, nil)
	if r.chunks != 1 || len(r.data[0]) != 4<<20 {
		t.Errorf("DF: %d chunks", r.chunks)
	}
	// An unaligned sparse read.
	if got := c.read(1<<20-3, 100001); !bytes.Equal(got[:3], []byte{0, 0, 0}) || !bytes.Equal(got[3:8195], data) {
		t.Error("unaligned sparse read returned other data")
	}
	r = c.do(cmdBlockStatus, 0, 4096, 8<<20-4096, nil)
	want := [][2]uint32{{1<<20 - 4096, 3}, {8192, 0}, {7<<20 - 8192, 3}}
	if len(r.extents) != 3 || r.extents[0] != want[0] || r.extents[1] != want[1] || r.extents[2] != want[2] {
		t.Errorf("extents %v, want %v", r.extents, want)
	}
	r = c.do(cmdBlockStatus, cmdFlagReqOne, 1<<20+100, 4<<20, nil)
	if len(r.extents) != 1 || r.extents[0] != [2]uint32{8092, 0} {
		t.Errorf("one extent: %v", r.extents)
	}
	// A comb of more pieces than a reply may have chunks.
	for i := range uint64(maxChunks) {
		c.write(4<<20+i*8192, data[:4096])
	}
	got := c.read(4<<20, maxChunks*8192+4096)
	for i := range maxChunks {
		if !bytes.Equal(got[i*8192:][:4096], data[:4096]) || !bytes.Equal(got[i*8192+4096:][:4096], make([]byte, 4096)) {
			t.Fatalf("tooth %d of the comb is wrong", i)
		}
	}
}

func TestLargestPayload(t *testing.T) {
	f := serve(t, nil, ram(64<<20, blocktest.Options{LogicalBlock: 4096, MaxDiscard: 5 << 20}))
	c := f.connect(t, "vm1")
	for _, off := range []uint64{0, 1 << 20, 12345} {
		p := pattern(maxPayload, off)
		c.write(off, p)
		if got := c.read(off, maxPayload); !bytes.Equal(got, p) {
			t.Fatalf("largest payload at %d is not read back", off)
		}
	}
	// Zeroes above the device's limit are cut, from an odd place to another.
	if r := c.do(cmdWriteZeroes, 0, 20001, 30_000_001, nil); r.code != 0 {
		t.Fatalf("large zeroes: %d %s", r.code, r.message)
	}
	if got := c.read(20001, 30_000_001); !bytes.Equal(got, make([]byte, 30_000_001)) {
		t.Error("zeroes are not read back")
	}
	p := pattern(maxPayload, 12345)
	if got := c.read(12345, 20001-12345); !bytes.Equal(got, p[:20001-12345]) {
		t.Error("zeroes reached before their range")
	}
	if got := c.read(30_020_002, 1000); !bytes.Equal(got, p[30_020_002-12345:][:1000]) {
		t.Error("zeroes reached behind their range")
	}
}

func TestFUAAndNoHoleReachTheDevice(t *testing.T) {
	var mu sync.Mutex
	var seen []string
	f := serve(t, nil, ram(1<<20, blocktest.Options{Trace: func(r *block.Request) {
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, r.Op.String()+" "+strconv.Itoa(int(r.Flags)))
	}}))
	c := f.connect(t, "vm1")
	p := make([]byte, 512)
	c.do(cmdWrite, cmdFlagFUA, 0, 512, p)
	c.do(cmdWrite, 0, 0, 512, p)
	c.do(cmdWrite, cmdFlagFUA, 0, 100, p[:100])
	c.do(cmdTrim, cmdFlagFUA, 0, 4096, nil)
	c.do(cmdWriteZeroes, cmdFlagFUA|cmdFlagNoHole, 0, 4096, nil)
	c.do(cmdWriteZeroes, cmdFlagNoHole, 0, 4096, nil)
	c.do(cmdFlush, 0, 0, 0, nil)
	want := "write 1,write 0,read 0,write 1,discard 1,write_zeroes 3,write_zeroes 2,flush 0"
	mu.Lock()
	defer mu.Unlock()
	if got := strings.Join(seen, ","); got != want {
		t.Errorf("the device saw %s, want %s", got, want)
	}
}
