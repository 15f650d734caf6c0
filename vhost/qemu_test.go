package vhost

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// bootSector says what it is on the serial port and makes QEMU exit: it is the
// guest of TestQEMUBootsFromTheVolume.
//
//	mov si, msg; cld
//	next: lodsb; test al, al; jz end; mov dx, 0x3f8; out dx, al; jmp next
//	end: mov dx, 0xf4; mov al, 0; out dx, al; hlt
func bootSector(text string) []byte {
	b := make([]byte, 512)
	code := []byte{
		0x31, 0xc0, 0x8e, 0xd8, // xor ax, ax; mov ds, ax
		0xbe, 0x40, 0x7c, 0xfc, // mov si, 0x7c40; cld
		0xac, 0x84, 0xc0, 0x74, 0x06, // next: lodsb; test al, al; jz end
		0xba, 0xf8, 0x03, 0xee, // mov dx, 0x3f8; out dx, al
		0xeb, 0xf5, // jmp next
		0xba, 0xf4, 0x00, 0xb0, 0x00, 0xee, 0xf4, // end: mov dx, 0xf4; mov al, 0; out dx, al; hlt
	}
	copy(b, code)
	copy(b[0x40:], text)
	b[510], b[511] = 0x55, 0xaa
	return b
}

// A real QEMU with its BIOS reads the boot sector through this server, with
// the features, the memory slots and the in-flight area that it negotiates.
func TestQEMUBootsFromTheVolume(t *testing.T) {
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip("qemu-system-x86_64 is not installed")
	}
	b := newBed(t, Config{})
	const text = "booted from a Scoria volume"
	b.dev.set(func(d *ramDevice) { copy(d.data, bootSector(text)) })
	serial := filepath.Join(t.TempDir(), "serial")
	cmd := exec.Command(qemu, "-accel", "tcg", "-m", "128", "-machine", "q35,memory-backend=mem", "-nodefaults", "-display", "none",
		"-object", "memory-backend-memfd,id=mem,size=128M,share=on",
		"-chardev", "socket,id=c0,path="+b.path+",reconnect=1",
		"-device", "vhost-user-blk-pci,chardev=c0,num-queues=2,bootindex=0",
		"-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-serial", "file:"+serial)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case <-ended:
	case <-time.After(4 * time.Minute):
		_ = cmd.Process.Kill()
		<-ended
	}
	got, _ := exec.Command("cat", serial).Output()
	st := b.ep.Stats()
	if !strings.Contains(string(got), text) || st.LastDisconnect != "" {
		t.Fatalf("serial %q, QEMU said %q, disconnected for %q; %+v", got, out.String(), st.LastDisconnect, st)
	}
	hurry(t, "session to end", func() bool { return b.ep.Stats().Sessions == 0 })
	if b.dev.claimed() {
		t.Fatal("claim left")
	}
	t.Logf("%d reads, %d kicks, %d calls, %d connections", st.Ops[0].Requests, st.Kicks, st.Calls, st.Connections)
}
