package integration

import (
	"encoding/json"
	"slices"
	"strconv"
	"strings"
	"testing"

	"scoria/integration/qemu"
	"scoria/vhost/wire"
)

// TestMemoryHotplug: memory is plugged into a guest under load, used as the target of
// its reads, and taken away under load again. QEMU tells of it by single regions.
func TestMemoryHotplug(t *testing.T) {
	const size = 256 << 20
	e := start(t)
	e.must(e.Create(e.ctx, "a", "64M"))
	e.must(e.Create(e.ctx, "b", "64M"))
	man := between(t, e.VhostSocket("a"))
	vm := e.boot(qemu.Options{MaxMiB: 2048, Disks: []qemu.Disk{{Socket: man.path, Queues: 2}, e.disk("b", 2)}})
	e.guest(vm, "echo online_movable >/sys/devices/system/memory/auto_online_blocks")
	e.must(vm.Background(e.ctx, "old", "torture -workers 4 -span-mib 4 -keep-mib 8 -stop /tmp/stop -run 10m"))
	said := func(r wire.Request) (n int) {
		all, _ := man.connection(0).messages()
		for _, m := range all {
			if m == r {
				n++
			}
		}
		return n
	}
	added, total := said(wire.AddMemReg), e.memTotal(vm)
	e.qmp(vm, "object-add", map[string]any{"qom-type": "memory-backend-memfd", "id": "more", "size": size, "share": true})
	e.qmp(vm, "device_add", map[string]any{"driver": "pc-dimm", "id": "dimm", "memdev": "more"})
	e.poll("the guest to have the memory", func() (bool, error) { return e.memTotal(vm) >= total+size>>10, vm.Dead() })
	at := e.dimms(vm)
	if len(at) != 1 || said(wire.AddMemReg) <= added || said(wire.SetMemTable) > 0 {
		t.Fatalf("memory at %#x; ADD_MEM_REG: %d, %d before; SET_MEM_TABLE: %d", at, said(wire.AddMemReg), added, said(wire.SetMemTable))
	}
	// What is taken now is movable, which only the new memory is.
	e.must(vm.Background(e.ctx, "new", "torture -device /dev/vdb -workers 4 -span-mib 4 -keep-mib 48 -stop /tmp/stop -run 10m"))
	e.poll("reads into the new memory", func() (bool, error) {
		return e.metric(`scoria_vhost_notifications_total{kind="call",volume="default/b"}`) > 1000, vm.Dead()
	})

	e.poll("the guest to give the memory back", func() (bool, error) {
		// A guest that could not free it for now has to be asked again; QEMU refuses
		// to while it waits for an answer.
		_, _ = vm.Monitor.Execute(e.ctx, "device_del", map[string]any{"id": "dimm"})
		return len(e.dimms(vm)) == 0, vm.Dead()
	})
	e.qmp(vm, "object-del", map[string]any{"id": "more"})
	if said(wire.RemMemReg) == 0 {
		t.Fatal("no REM_MEM_REG")
	}
	e.guest(vm, "touch /tmp/stop")
	e.tortureEnd(vm, "old")
	r := e.tortureEnd(vm, "new")
	within := func(span [2]uint64) bool { return span[0] >= at[0] && span[1] < at[0]+size }
	if !within(r.KeptBegan) || r.KeptEnded[1] >= at[0] {
		t.Fatalf("memory at %#x; what was read into lay at %#x before it went, at %#x after", at, r.KeptBegan, r.KeptEnded)
	}
	e.powerOff(vm)
}

// memTotal is how much memory the guest has, in KiB.
func (e *env) memTotal(vm *qemu.VM) int {
	e.Helper()
	f := strings.Fields(e.guest(vm, "grep MemTotal /proc/meminfo"))
	n, err := strconv.Atoi(f[slices.Index(f, "MemTotal:")+1])
	e.must(err)
	return n
}

// dimms returns the guest addresses of plugged memory.
func (e *env) dimms(vm *qemu.VM) (at []uint64) {
	e.Helper()
	var list []struct {
		Data struct {
			Addr uint64 `json:"addr"`
		} `json:"data"`
	}
	e.must(json.Unmarshal(e.qmp(vm, "query-memory-devices", nil), &list))
	for _, d := range list {
		at = append(at, d.Data.Addr)
	}
	return at
}

// qmp carries out a command of QEMU's monitor that must succeed.
func (e *env) qmp(vm *qemu.VM, command string, arguments any) json.RawMessage {
	e.Helper()
	raw, err := vm.Monitor.Execute(e.ctx, command, arguments)
	e.must(err)
	return raw
}
