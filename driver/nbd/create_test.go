package nbd

import (
	"strings"
	"testing"

	"scoria/driver/block/blocktest"
)

func TestParseSize(t *testing.T) {
	for _, tc := range []struct {
		s    string
		want uint64 // 0: an error
	}{
		{"10G", 10 << 30}, {"10g", 10 << 30}, {"4096", 4096}, {"1", 4096}, {"4097", 8192}, {"4097B", 8192}, {"4097b", 8192},
		{"1.5M", 3 << 19}, {"0.5k", 4096}, {"2T", 2 << 40}, {"1P", 1 << 50}, {"7E", 7 << 60}, {"100000000", 100003840},
		{"", 0}, {"0", 0}, {"-1", 0}, {"+1", 0}, {"G", 0}, {"1e3", 0}, {"0x10", 0}, {"1/2", 0}, {"10GB", 0}, {"8E", 0}, {"1.2.3", 0},
		{".", 0}, {"1 G", 0}, {"99999999999999999999E", 0}, {strings.Repeat("1", 100), 0}, {"\"", 0}, {"1\x02", 0},
	} {
		got, err := parseSize(tc.s)
		if got != tc.want || (err == nil) != (tc.want != 0) {
			t.Errorf("parseSize(%q) = %d, %v, want %d", tc.s, got, err, tc.want)
		}
	}
}

func TestParseExportName(t *testing.T) {
	for _, tc := range []struct {
		s, volume string
		size      uint64
	}{
		{"vm1", "default/vm1", 0}, {"fast/vm1", "fast/vm1", 0}, {"vm1@monday", "default/vm1@monday", 0}, {"vm1:size=1G", "default/vm1", 1 << 30},
		{"fast/vm1:size=4k", "fast/vm1", 4096}, {"", "", 0}, {":size=1G", "", 0}, {"vm1:", "", 0}, {"vm1:size=", "", 0}, {"vm1:1G", "", 0},
	} {
		n, err := parseExportName(tc.s)
		if tc.volume == "" {
			if err == nil {
				t.Errorf("%q is taken for %+v", tc.s, n)
			}
		} else if err != nil || n.volume != tc.volume || n.size != tc.size {
			t.Errorf("%q is %+v, %v", tc.s, n, err)
		}
	}
}

func TestCreateSizeReadsOnlyQemuImgCreateOfTheExport(t *testing.T) {
	const u = "nbd+unix:///default/vm1?socket=/run/scoria/nbd.sock"
	for _, tc := range []struct {
		args string // separated by blanks
		want uint64
	}{
		{"qemu-img create -f raw " + u + " 10G", 10 << 30},
		{"/usr/bin/qemu-img create " + u + " 10G", 10 << 30},
		{"qemu-img create -fraw " + u + " 10G", 10 << 30},
		{"qemu-img create " + u + " -qf raw 10G", 10 << 30},
		{"qemu-img create -q -u -f raw -- " + u + " 5000", 8192},
		{"qemu-img create -f raw -o preallocation=off,size=1M " + u, 1 << 20},
		{"qemu-img create --format raw " + u + " 1M", 1 << 20},
		{"qemu-img create --format=raw --object secret,id=x " + u + " 1M", 1 << 20},
		{"qemu-img -T trace create -f raw nbd+unix:///vm1?socket=s 1M", 1 << 20},
		{"qemu-img create -f raw nbd:unix:/s:exportname=default/vm1 1M", 1 << 20},
		{"qemu-img create -f raw nbd:unix:/s:exportname=vm1 1M", 1 << 20},

		{"qemu-img create -f qcow2 " + u + " 10G", 0},
		{"qemu-img create -f raw " + u, 0},
		{"qemu-img create -f raw " + u + " much", 0},
		{"qemu-img create -f raw " + u + " 0", 0},
		{"qemu-img create -f raw nbd+unix:///default/vm2?socket=s 10G", 0},
		{"qemu-img create -f raw nbd+unix:///fast/vm1?socket=s 10G", 0},
		{"qemu-img create -f raw nbd+unix:///default/vm1/?socket=s 10G", 0},
		{"qemu-img create -f raw /default/vm1 10G", 0},
		{"qemu-img create -f raw nbd://host/default/vm1 10G", 0},
		{"qemu-img create -f raw " + u + " 10G extra", 0},
		{"qemu-img create -f", 0},
		{"qemu-img create --format", 0},
		{"qemu-img create --object", 0},
		{"qemu-img create", 0},
		{"qemu-img -T", 0},
		{"qemu-img info " + u, 0},
		{"qemu-img convert -O raw file " + u + " 10G", 0},
		{"qemu-io create -f raw " + u + " 10G", 0},
		{"qemu-img", 0},
		{"", 0},
	} {
		if got := createSize(strings.Fields(tc.args), "default/vm1"); got != tc.want {
			t.Errorf("%s: %d, want %d", tc.args, got, tc.want)
		}
	}
}

func TestUnknownExportIsNotCreated(t *testing.T) {
	f := serve(t, nil, ram(1<<20, blocktest.Options{}))
	c := f.dial(t)
	r := c.option(optGo, infoRequest("vm9"))
	if r[0].typ != repErrUnknown || !strings.Contains(string(r[0].data), "scoria volume create default/vm9") {
		t.Errorf("go to an unknown export: %#x %s", r[0].typ, r[0].data)
	}
	for _, name := range []string{"vm9@snap:size=1M", "vm9:size=1G:size=1M"} {
		if r := c.option(optGo, infoRequest(name)); r[0].typ < 1<<31 {
			t.Errorf("%s was created", name)
		}
	}
	if f.Stats().Created != 0 {
		t.Error("a volume was created")
	}
}

func TestSizeInTheNameCreates(t *testing.T) {
	f := serve(t, nil)
	for range 2 { // the second time it exists
		c := f.dial(t)
		c.structure("fast/new:size=5000")
		if c.mustGo("fast/new:size=5000"); c.size != 8192 {
			t.Errorf("size %d, want 8192", c.size)
		}
		if r := c.do(cmdBlockStatus, 0, 0, 8192, nil); r.code != 0 {
			t.Errorf("the metadata context was lost: %s", r.message)
		}
	}
	if f.Stats().Created != 1 || f.pool.Get("fast/new") == nil {
		t.Errorf("%d volumes were created, want fast/new only", f.Stats().Created)
	}
}

func FuzzCreateSize(f *testing.F) {
	f.Add("qemu-img create -f raw nbd+unix:///default/vm1?socket=s 10G")
	f.Add("qemu-img create -o size=1,x -F -b --object -- nbd:unix:s:exportname=vm1")
	f.Fuzz(func(t *testing.T, args string) {
		if n := createSize(strings.Split(args, " "), "default/vm1"); n%4096 != 0 {
			t.Errorf("size %d", n)
		}
	})
}
