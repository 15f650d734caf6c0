package client

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"scoria/shm/mem"
	"scoria/vhost/wire"
)

// Guest addresses start at 1 GiB and user addresses at a place where nothing of
// this process lies: a server that mixes up the two kinds, or dereferences
// either, is found out.
const (
	guestBase  = 1 << 30
	userBase   = 0x5c0000000000
	regionStep = 1 << 30 // alignment of regions that are added later
)

// Region is a piece of guest memory: one memfd, one slot of the memory table.
type Region struct {
	FD        int
	GuestAddr uint64
	UserAddr  uint64
	mapping   *mem.Mapping
}

// Bytes is the memory; it is gone after RemoveMemory or Client.Close.
func (r *Region) Bytes() []byte { return r.mapping.Bytes() }

// Buffer is the part [off, off+n) of the region as a request's buffer.
func (r *Region) Buffer(off uint64, n uint32) Buffer {
	return Buffer{Addr: r.GuestAddr + off, Len: n}
}

func (r *Region) wire() wire.Region {
	return wire.Region{GuestAddr: r.GuestAddr, Size: uint64(len(r.Bytes())), UserAddr: r.UserAddr}
}

func newRegion(name string, bytes, guest, user uint64, seal bool) (*Region, error) {
	fd, err := mem.CreateMemfd(name, int64(bytes))
	if err != nil {
		return nil, err
	}
	if seal {
		if err := mem.SealSize(fd); err != nil {
			unix.Close(fd)
			return nil, err
		}
	}
	m, err := mem.Map(fd, 0, bytes)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &Region{FD: fd, GuestAddr: guest, UserAddr: user, mapping: m}, nil
}

// behind is the next guest address for a region after r.
func behind(r *Region) uint64 {
	return (r.GuestAddr + uint64(len(r.Bytes())) + regionStep - 1) &^ (regionStep - 1)
}

func (r *Region) close() {
	r.mapping.Release()
	unix.Close(r.FD)
}

// Arena is the data part of the client's memory, Options.MemoryBytes long.
func (c *Client) Arena() []byte { return c.main.Bytes()[c.arena:] }

// Addr is the guest address of the arena's byte off.
func (c *Client) Addr(off uint64) uint64 { return c.main.GuestAddr + c.arena + off }

// Buffer is the part [off, off+n) of the arena as a request's buffer.
func (c *Client) Buffer(off uint64, n uint32) Buffer { return Buffer{Addr: c.Addr(off), Len: n} }

// Main is the region that holds rings and arena.
func (c *Client) Main() *Region { return c.main }

// FillArena writes random bytes from seed all over the arena, so that it is
// backed by pages and what is written to the disk doesn't compress.
func (c *Client) FillArena(seed uint64) {
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	rand.NewChaCha8(key).Read(c.Arena()) // never fails
}

// AddMemory adds a slot of bytes to the running device (ADD_MEM_REG).
func (c *Client) AddMemory(bytes uint64) (*Region, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.protocol&wire.ProtocolConfigureMemSlots == 0 {
		return nil, fmt.Errorf("add memory: %w: CONFIGURE_MEM_SLOTS", ErrNotNegotiated)
	}
	r, err := newRegion("vhost-client-slot", bytes, c.nextGuest, userBase+c.nextGuest, !c.opts.Unsealed)
	if err != nil {
		return nil, err
	}
	if err := c.conn.Do(wire.AddMemReg, wire.AppendRegion(nil, r.wire()), r.FD); err != nil {
		r.close()
		return nil, err
	}
	c.nextGuest = behind(r)
	c.extra = append(c.extra, r)
	c.session.slots = append(c.session.slots, r)
	return r, nil
}

// RemoveMemory takes a slot out of the device (REM_MEM_REG) and unmaps it.
func (c *Client) RemoveMemory(r *Region) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, e := range c.extra {
		if e != r {
			continue
		}
		if err := c.conn.Do(wire.RemMemReg, wire.AppendRegion(nil, r.wire())); err != nil {
			return err
		}
		c.extra = slices.Delete(c.extra, i, i+1)
		c.session.slots = slices.DeleteFunc(c.session.slots, func(s *Region) bool { return s == r })
		r.close()
		return nil
	}
	return fmt.Errorf("remove memory: %w", mem.ErrNoRegion)
}

// sendMemory tells the server all regions: one by one where it can take them so,
// or as a table. As in QEMU, slots stay from one start of the rings to the next.
func (c *Client) sendMemory() error {
	regions := append([]*Region{c.main}, c.extra...)
	if c.protocol&wire.ProtocolConfigureMemSlots != 0 && !c.opts.MemTable {
		for _, r := range regions {
			if slices.Contains(c.session.slots, r) {
				continue
			}
			if err := c.conn.Do(wire.AddMemReg, wire.AppendRegion(nil, r.wire()), r.FD); err != nil {
				return err
			}
			c.session.slots = append(c.session.slots, r)
		}
		return nil
	}
	var table []wire.Region
	var fds []int
	for _, r := range regions {
		table, fds = append(table, r.wire()), append(fds, r.FD)
	}
	return c.conn.Do(wire.SetMemTable, wire.AppendMemTable(nil, table), fds...)
}

// unixConn makes a connection of a descriptor and takes it over.
func unixConn(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	u, ok := conn.(*net.UnixConn)
	if !ok {
		conn.Close()
		return nil, fmt.Errorf("socket: %T is no unix socket", conn)
	}
	return u, nil
}
