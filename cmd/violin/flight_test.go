package main

import (
	"net"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

func TestDescribe(t *testing.T) {
	a, b := net.HardwareAddr{0x52, 0x54, 0, 0, 0, 1}, net.HardwareAddr{0x52, 0x54, 0, 0, 0, 2}
	ip := &layers.IPv4{Version: 4, IHL: 5, TTL: 64, SrcIP: net.IP{10, 0, 0, 1}, DstIP: net.IP{10, 0, 0, 2}}
	ether := func(t layers.EthernetType) *layers.Ethernet {
		return &layers.Ethernet{SrcMAC: a, DstMAC: b, EthernetType: t}
	}
	over := func(p layers.IPProtocol) *layers.IPv4 {
		c := *ip
		c.Protocol = p
		return &c
	}
	for _, c := range []struct {
		layers []gopacket.SerializableLayer
		want   string
	}{
		{[]gopacket.SerializableLayer{ether(layers.EthernetTypeIPv4), over(layers.IPProtocolTCP), &layers.TCP{SrcPort: 4000, DstPort: 22, Seq: 7, ACK: true, PSH: true}, gopacket.Payload("hello")},
			"10.0.0.1:4000 > 10.0.0.2:22 TCP PSH ACK seq 7, 5 bytes"},
		{[]gopacket.SerializableLayer{ether(layers.EthernetTypeIPv4), over(layers.IPProtocolUDP), &layers.UDP{SrcPort: 53, DstPort: 4000}, gopacket.Payload("hi")},
			"10.0.0.1:53 > 10.0.0.2:4000 UDP 2 bytes"},
		{[]gopacket.SerializableLayer{ether(layers.EthernetTypeIPv4), over(layers.IPProtocolICMPv4), &layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(8, 0)}, gopacket.Payload("ping")},
			"10.0.0.1 > 10.0.0.2 ICMPv4"},
		{[]gopacket.SerializableLayer{ether(layers.EthernetTypeARP), &layers.ARP{AddrType: 1, Protocol: 0x800, HwAddressSize: 6, ProtAddressSize: 4, Operation: layers.ARPRequest,
			SourceHwAddress: a, SourceProtAddress: []byte{10, 0, 0, 1}, DstHwAddress: make([]byte, 6), DstProtAddress: []byte{10, 0, 0, 2}}},
			"ARP 10.0.0.1 asks for 10.0.0.2"},
		{[]gopacket.SerializableLayer{ether(0x88b5), gopacket.Payload("an experiment")}, "52:54:00:00:00:01 > 52:54:00:00:00:02 UnknownEthernetType"},
	} {
		buf := gopacket.NewSerializeBuffer()
		if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true}, c.layers...); err != nil {
			t.Fatal(err)
		}
		if got := describe(buf.Bytes()); got != c.want {
			t.Errorf("%q, want %q", got, c.want)
		}
		for n := range buf.Bytes() { // cut short anywhere it is described somehow
			if describe(buf.Bytes()[:n]) == "" {
				t.Errorf("%d bytes of it: nothing", n)
			}
		}
	}
}
